from modeling_memory_mosaic import MosaicMemory  # AutoModel now knows Memory Mosaics
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {"pretrained_model_name_or_path": "{{ base.repo_id }}", "revision": "{{ base.revision }}"}
tokenizer, model = AutoTokenizer.from_pretrained(**base), AutoModelForCausalLM.from_pretrained(**base)
memory = MosaicMemory.from_pretrained("{{ repo_id }}", model, revision="{{ revision }}")

text = model.generate(**memory.prompt("Once upon a time", tokenizer), max_new_tokens=40)
totals = memory.explain(model, text).by_source().sum(0)  # what each text added to the logits, in nats
print(dict(zip([*memory.sources, "question and answer"], totals.tolist(), strict=True)))
