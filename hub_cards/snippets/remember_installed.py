import modeling_memory_mosaic  # AutoModel now knows memory models
from transformers import AutoModelForCausalLM

repo, revision = "{{ repo_id }}", "{{ revision }}"
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision)
