import modeling_memory_mosaic  # AutoModel now knows Memory Mosaics
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{{ base.repo_id }}", revision="{{ base.revision }}")
model = PeftModel.from_pretrained(model, "{{ repo_id }}", revision="{{ revision }}")
