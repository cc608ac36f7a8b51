from transformers import AutoModelForCausalLM, AutoTokenizer

place = {"pretrained_model_name_or_path": "{{ repo_id }}", "revision": "{{ revision }}", "trust_remote_code": True}
tokenizer, model = AutoTokenizer.from_pretrained(**place), AutoModelForCausalLM.from_pretrained(**place)
document = tokenizer("Once upon a time there was a girl. She had a red ball and played with it.", return_tensors="pt")
memories, rest = model.encode(**document)  # memories of all whole chunks but the last one
print(tokenizer.decode(model.generate(**rest, **memories, max_new_tokens=40)[0]))
