import modeling_memory_mosaic  # AutoModel now knows Memory Mosaics
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, base_revision = "{{ base.repo_id }}", "{{ base.revision }}"
repo, revision = "{{ repo_id }}", "{{ revision }}"
model = AutoModelForCausalLM.from_pretrained(base, revision=base_revision)
model = PeftModel.from_pretrained(model, repo, revision=revision)
