from datasets import Dataset
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer

file = hf_hub_download("{{ repo_id }}", "memories.parquet", repo_type="dataset", revision="{{ revision }}")
rows = Dataset.from_parquet(file)
base, pinned = "{{ base.repo_id }}", {"revision": "{{ base.revision }}", "trust_remote_code": True}
tokenizer, model = AutoTokenizer.from_pretrained(base, **pinned), AutoModelForCausalLM.from_pretrained(base, **pinned)
memories = model.memories_from_rows(row for row in rows if row["source"] == rows[0]["source"])
question = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**question, **memories, max_new_tokens=40)[0]))
