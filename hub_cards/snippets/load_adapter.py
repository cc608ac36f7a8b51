from peft import PeftModel
from transformers import pipeline

base, base_revision = "{{ base.repo_id }}", "{{ base.revision }}"
repo, revision = "{{ repo_id }}", "{{ revision }}"
storyteller = pipeline("text-generation", model=base, revision=base_revision, trust_remote_code=True)
storyteller.model = PeftModel.from_pretrained(storyteller.model, repo, revision=revision)
print(storyteller("Once upon a time", max_new_tokens=40)[0]["generated_text"])
