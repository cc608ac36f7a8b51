from modeling_memory_mosaic import MosaicMemory
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, revision = "{{ repo_id }}", "{{ revision }}"
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision)
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision)

texts = {"lily": "Lily has the red ball in the park.", "tom": "Tom has the blue kite at the beach."}
read = [
    model.memorize(**tokenizer(text, return_tensors="pt"), source=name, tokenizer=tokenizer)
    for name, text in texts.items()
]
memory = MosaicMemory.union(read)  # in any order, with the same answers
answer = model.generate(**memory.prompt("Who has the blue kite?", tokenizer), max_new_tokens=10)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
memory.forget("tom")
