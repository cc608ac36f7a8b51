from hashlib import sha256
from pathlib import Path

from huggingface_hub import snapshot_download

folder = Path(snapshot_download("{{ repo_id }}", revision="{{ revision }}"))
for line in (folder / "SHA256SUMS").read_text().splitlines():
    expected, name = line.split(maxsplit=1)
    assert sha256((folder / name).read_bytes()).hexdigest() == expected, f"{name} has been changed"
