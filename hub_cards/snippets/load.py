from transformers import pipeline

repo, revision = "{{ repo_id }}", "{{ revision }}"
storyteller = pipeline("text-generation", model=repo, revision=revision, trust_remote_code=True)
print(storyteller("Once upon a time", max_new_tokens=40)[0]["generated_text"])
