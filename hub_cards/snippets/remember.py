from transformers import AutoModelForCausalLM, AutoTokenizer

repo, revision = "{{ repo_id }}", "{{ revision }}"
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)

document = tokenizer("Once upon a time there was a girl. She had a red ball and played with it.", return_tensors="pt")
memories, rest = model.encode(**document)  # memories of all whole chunks but the last one
print(memories["memories"].shape)  # (batch, memories, vectors of each, numbers of each)
text = model.generate(**rest, **memories, max_new_tokens=40)
print(tokenizer.decode(text[0]))
