import modeling_memory_mosaic  # AutoModel now knows memory models
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{{ repo_id }}", revision="{{ revision }}")
