from datasets import load_dataset

stories = load_dataset("{{ published.repo_id }}", revision="{{ published.revision }}", split="train")
print(stories[0]["text"])
