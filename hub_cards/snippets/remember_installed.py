import modeling_memory_mosaic  # AutoModel now knows memory models
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, revision = "{{ repo_id }}", "{{ revision }}"
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision)
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision)

memories, _ = model.encode(**tokenizer("Once upon a time there was a girl. She had a red ball.", return_tensors="pt"))
print(memories["memories"].shape)  # (batch, memories, vectors of each, numbers of each)
