from hashlib import sha256
from pathlib import Path

from huggingface_hub import snapshot_download

repo, revision = "{{ repo_id }}", "{{ revision }}"
expected = """
{% for name, digest in files.items() if name.endswith((".py", ".safetensors", "config.json")) %}
{{ digest }}  {{ name }}
{% endfor %}
"""
listed = {name: digest for digest, name in map(str.split, expected.strip().splitlines())}
folder = Path(snapshot_download(repo, revision=revision))
present = {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}
assert listed.items() <= present.items(), "files are missing, or are not those of this card"
assert not [name for name in present if name.endswith(".py") and name not in listed], "there is more code than listed"
