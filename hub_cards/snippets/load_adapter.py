from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, base_revision = "{{ base.repo_id }}", "{{ base.revision }}"
repo, revision = "{{ repo_id }}", "{{ revision }}"
tokenizer = AutoTokenizer.from_pretrained(base, revision=base_revision, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(base, revision=base_revision, trust_remote_code=True)
model = PeftModel.from_pretrained(model, repo, revision=revision)

inputs = tokenizer("Once upon a time", return_tensors="pt")
text = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.8)
print(tokenizer.decode(text[0], skip_special_tokens=True))
