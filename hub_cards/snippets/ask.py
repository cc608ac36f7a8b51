from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

base, base_revision = "{{ base.repo_id }}", "{{ base.revision }}"
repo, revision = "{{ repo_id }}", "{{ revision }}"
tokenizer = AutoTokenizer.from_pretrained(base, revision=base_revision, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(base, revision=base_revision, trust_remote_code=True)
MosaicMemory = get_class_from_dynamic_module("store_memory_mosaic.MosaicMemory", base, revision=base_revision)

memory = MosaicMemory.from_pretrained(repo, model, revision=revision)
text = model.generate(**memory.prompt("Once upon a time", tokenizer), max_new_tokens=40)
print(tokenizer.decode(text[0], skip_special_tokens=True))

totals = memory.explain(model, text).by_source().sum(0)  # what each text added to the logits, in nats
print(dict(zip([*memory.sources, "question and answer"], totals.tolist(), strict=True)))
