from modeling_memory_mosaic import inspect_units, summarize_units
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, revision = "{{ repo_id }}", "{{ revision }}"
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision)
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision)

units = inspect_units(model, **tokenizer("Lily had a red ball. The red ball", return_tensors="pt"))
print(summarize_units(units))  # means over the tokens, a row for each unit
