from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

base, pinned = "{{ base.repo_id }}", {"revision": "{{ base.revision }}", "trust_remote_code": True}
tokenizer, model = AutoTokenizer.from_pretrained(base, **pinned), AutoModelForCausalLM.from_pretrained(base, **pinned)
memory_class = get_class_from_dynamic_module("store_memory_mosaic.MosaicMemory", base, **pinned)
memory = memory_class.from_pretrained("{{ repo_id }}", model, revision="{{ revision }}")
print(tokenizer.decode(model.generate(**memory.prompt("Once upon a time", tokenizer), max_new_tokens=40)[0]))
