from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

repo, revision = "{{ repo_id }}", "{{ revision }}"
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
adapted = get_peft_model(model, LoraConfig(target_modules=["k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]))
adapted.print_trainable_parameters()
