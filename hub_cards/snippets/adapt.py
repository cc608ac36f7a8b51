from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

repo, revision = "{{ repo_id }}", "{{ revision }}"
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
slots = ["persistent_memory.slot_keys", "persistent_memory.slot_values"]
lora = LoraConfig(target_modules=["k_proj", "v_proj", "o_proj"], target_parameters=slots)
adapted = get_peft_model(model, lora)
adapted.print_trainable_parameters()
