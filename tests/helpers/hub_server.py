# SPDX-License-Identifier: Apache-2.0
"""A Hub on this machine, with the endpoints that `huggingface_hub` uses to create, fill and read repositories.

Large files come as LFS objects, whose checksums it verifies, or by way of Xet, whose chunks it does not check.
Branches and commits behave as on the real Hub: it refuses a commit whose parent is not the newest. It can drop
connections and refuse requests.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers
import yaml
from huggingface_hub import constants


TOKEN = "hf_" + "goodtoken" * 3
TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
FILES = "/{repo_id}/resolve/{revision}/{filename}"
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cdla-sharing-1.0"}


class Repository:
    """The commits of a repository, as contents by path, and the revisions that name them."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.proposals: list[dict] = []
        self.history: list[tuple[str, str]] = []  # revision and commit, in order
        self.commit("main", {".gitattributes": b""})

    def commit(self, revision: str, files: dict[str, bytes]) -> str:
        content = repr(
            (len(self.history), sorted((name, hashlib.sha1(data).digest()) for name, data in files.items()))
        )
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[revision] = oid
        self.history.append((revision, oid))
        return oid

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.find(revision)]


class Refusal(Exception):
    """An answer with the status of an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        headers: dict[str, str] | None = None,
        answer: dict[str, str] | None = None,
    ):
        self.answer = answer or {}
        self.status, self.message, self.headers = status, message, {"X-Error-Code": code, **(headers or {})}


class Hub(ThreadingHTTPServer):
    """The server. Three functions decide on each request, given as method and path.

    `drop_before` breaks the connection before the request is carried out, `drop_after` breaks it afterwards, and
    `refuse` returns a refusal or None.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.drop_before: Callable[[str], bool] = lambda request: False
        self.drop_after: Callable[[str], bool] = lambda request: False
        self.refuse: Callable[[str], Refusal | None] = lambda request: None

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that has broken off is no fault here


@contextlib.contextmanager
def served(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Let `huggingface_hub` in this process speak to a Hub on this machine, and keep what it fetches in `cache`."""
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + FILES)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # transformers keeps a client of the first address that it met.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        huggingface_hub.utils.disable_progress_bars()
        yield server
    huggingface_hub.utils.enable_progress_bars()


class Handler(BaseHTTPRequestHandler):
    """The endpoints; `ROUTES` has their methods and paths."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _serve(self):
        request = f"{self.command} {self.path}"
        self.server.requests.append(request)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.drop_before(request):
            self.close_connection = True
            return
        try:
            refusal = self.server.refuse(request)
            if refusal is not None:
                raise refusal
            status, headers, answer = 200, {}, self._route(*urlsplit(self.path)[2:4])
            if isinstance(answer, tuple):
                headers, answer = answer
        except Refusal as refusal:
            # The real Hub does not echo tokens. A proxy might.
            message = f"{refusal.message}, with {self.headers.get('Authorization')}"
            status, answer = refusal.status, {"error": message, "errors": [{"message": refusal.message}]}
            answer |= refusal.answer
            headers = {**refusal.headers, "X-Error-Message": message}
        if self.server.drop_after(request):
            self.close_connection = True
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, path: str, query: str):
        for methods, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods:
                groups = [unquote(group or "") for group in found.groups()]
                return action(self, *groups, **{name: values[0] for name, values in parse_qs(query).items()})
        raise Refusal(404, f"no such endpoint: {self.command} {path}")

    def _may_write(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid username or password")

    def _repository(self, kind: str, repo_id: str) -> Repository:
        repository = self.server.repositories.get((TYPES[kind], repo_id))
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Refusal(404 if repository is None else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit_of(self, kind: str, repo_id: str, revision: str) -> tuple[Repository, str]:
        repository = self._repository(kind, repo_id)
        oid = repository.find(revision)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, oid

    def validate(self):
        content = json.loads(self.body)["content"]
        metadata = yaml.safe_load(content.split("---")[1])
        if metadata.get("license") not in {None, *LICENSES}:
            raise Refusal(400, f'"license" must be one of {sorted(LICENSES)}')
        return {"warnings": [], "errors": []}

    def create(self):
        self._may_write()
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization', 'someone')}/{wanted['name']}"
        key = (wanted.get("type") or "model", repo_id)
        if key in self.server.repositories:
            raise Refusal(409, "You already created this repo", answer={"url": f"{self.server.url}/{repo_id}"})
        private = wanted.get("private", wanted.get("visibility") == "private")
        repository = self.server.repositories[key] = Repository(bool(private))
        if key[0] == "space":
            repository.commit("main", {**repository.files(), "README.md": b"---\nsdk: gradio\n---\nSee the docs.\n"})
        return {"url": f"{self.server.url}/{repo_id}", "name": repo_id}

    def info(self, kind: str, repo_id: str, revision: str = "main", **query):
        repository, oid = self._commit_of(kind, repo_id, revision)
        siblings = [{"rfilename": name} for name in repository.commits[oid]]
        return {"id": repo_id, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}

    def tree(self, kind: str, repo_id: str, revision: str, **query):
        repository, oid = self._commit_of(kind, repo_id, revision)
        return [self._entry(name, data) for name, data in repository.commits[oid].items()]

    def _entry(self, name: str, data: bytes):
        entry = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
        if _is_large(name):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def branch(self, kind: str, repo_id: str, name: str):
        self._may_write()
        start = json.loads(self.body).get("startingPoint", "main")
        repository, oid = self._commit_of(kind, repo_id, start)
        if name in repository.refs:
            raise Refusal(409, "Reference already exists")
        repository.refs[name] = oid
        return {}

    def paths_info(self, kind: str, repo_id: str, revision: str):
        repository, oid = self._commit_of(kind, repo_id, revision)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return [self._entry(name, data) for name, data in repository.commits[oid].items() if name in wanted]

    def discussions(self, kind: str, repo_id: str, **query):
        found = self._repository(kind, repo_id).proposals
        return {"discussions": found, "count": len(found), "start": 0}

    def preupload(self, kind: str, repo_id: str, revision: str, **query):
        self._may_write()
        repository, oid = self._commit_of(kind, repo_id, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if _is_large(file["path"]) else "regular"
            known = repository.commits[oid].get(file["path"])
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if known is not None:
                files[-1]["oid"] = hashlib.sha256(known).hexdigest() if mode == "lfs" else _blob_id(known)
        return {"files": files}

    def batch(self, repo_id: str):
        self._may_write()
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/blobs/{wanted['oid']}"}}
            actions = {} if wanted["oid"] in self.server.blobs else {"actions": upload}
            objects.append({**wanted, **actions})
        return {"transfer": "basic", "objects": objects}

    def put_blob(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "checksum mismatch")
        self.server.blobs[oid] = self.body
        return {}

    def xet_token(self, kind: str, repo_id: str, revision: str):
        self._may_write()
        token = {"accessToken": "of xet", "exp": int(time.time()) + 3600, "casUrl": f"{self.server.url}/cas"}
        headers = {"Access-Token": token["accessToken"], "Token-Expiration": str(token["exp"])}
        headers["Cas-Url"] = token["casUrl"]
        return {f"X-Xet-{name}": value for name, value in headers.items()}, token

    def xorb(self, oid: str):
        return {"was_inserted": True}

    def shard(self):
        return {"result": 1}

    def commit(self, kind: str, repo_id: str, revision: str, create_pr: str = ""):
        self._may_write()
        repository, oid = self._commit_of(kind, repo_id, revision)
        files, title = dict(repository.commits[oid]), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit", oid) != oid:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs.get(value["oid"], b"in xet: " + value["oid"].encode())
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = len(repository.proposals) + 1
        if create_pr:
            revision = f"refs/pr/{number}"
            proposal = {"title": title, "num": number, "status": "open", "isPullRequest": True}
            now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            repository.proposals.append({**proposal, "createdAt": now, "repo": {"name": repo_id, "type": TYPES[kind]}})
        new = repository.commit(revision, files)
        url = f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        answer = {"commitOid": new, "commitUrl": f"{url}/commit/{new}"}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if create_pr else {})

    def resolve(self, kind: str, repo_id: str, revision: str, name: str):
        repository, oid = self._commit_of((kind or "models/")[:-1], repo_id, revision)
        data = repository.commits[oid].get(name)
        if data is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return {"X-Repo-Commit": oid, "ETag": f'"{_blob_id(data)}"'}, data


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".png", ".gz"))


_KIND, _ID = "(models|datasets|spaces)", "([^/]+/[^/]+)"
ROUTES = [
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), "/api/repos/create", Handler.create),
    (("GET",), f"/api/{_KIND}/{_ID}", Handler.info),
    (("GET",), f"/api/{_KIND}/{_ID}/revision/(.+)", Handler.info),
    (("GET",), f"/api/{_KIND}/{_ID}/tree/([^/]+)", Handler.tree),
    (("POST",), f"/api/{_KIND}/{_ID}/branch/(.+)", Handler.branch),
    (("POST",), f"/api/{_KIND}/{_ID}/paths-info/([^/]+)", Handler.paths_info),
    (("GET",), f"/api/{_KIND}/{_ID}/discussions", Handler.discussions),
    (("POST",), f"/api/{_KIND}/{_ID}/preupload/([^/]+)", Handler.preupload),
    (("POST",), f"/(?:datasets/|spaces/)?{_ID}\\.git/info/lfs/objects/batch", Handler.batch),
    (("GET",), f"/api/{_KIND}/{_ID}/xet-write-token/(.+)", Handler.xet_token),
    (("POST",), "/cas/v1/xorbs/default/(\\w+)", Handler.xorb),
    (("POST",), "/cas/v1/shards", Handler.shard),
    (("PUT",), "/blobs/(\\w+)", Handler.put_blob),
    (("POST",), f"/api/{_KIND}/{_ID}/commit/([^/]+)", Handler.commit),
    (("GET", "HEAD"), f"/(datasets/|spaces/)?{_ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]
