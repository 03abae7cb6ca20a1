"""Plays a Hub on loopback: enough of its HTTP protocol for the real client to up- and download.

Repositories are branches of commits, each a tree of path to blob; large files live apart, by their
SHA-256, as the Hub's do. Faults can be planted. What the protocol has beside this (Xet, datasets,
pull requests) is answered with 501.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
LARGE_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its content, or the SHA-256 of a large one."""

    content: bytes
    oid: str | None = None

    @property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.oid or self.git_id


@dataclass
class Repository:
    """Holds the branches, which name commits, and the commits, which are trees."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, Blob]) -> str:
        listing = repr((len(self.trees), sorted((p, b.etag) for p, b in tree.items())))
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.trees[sha] = tree
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.trees else None)


class Refusal(Exception):
    """An HTTP answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """The server: `with HubServer() as hub: ... hub.url ...`.

    Attributes:
        repositories: by owner/name.
        large_files: content by SHA-256.
        requests: (method, path) of everything asked.
        faults: [method pattern, path pattern, requests to let pass, status or None to hang up].
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[list] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # another host, as the Hub's is: the client takes headers from the Hub's own answers
        self.storage_url = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, *, after: int = 0, status: int | None = 403):
        """Plants a fault in one request, once `after` such requests have passed.

        It is refused with `status` or, with None, cut off in the middle.
        """
        self.faults.append([method, re.compile(path), after, status])

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        repository = self.repositories[repo_id]
        return set(repository.trees[repository.resolve(revision)])

    def read(self, repo_id: str, path: str, revision: str = "main") -> str:
        repository = self.repositories[repo_id]
        return repository.trees[repository.resolve(revision)][path].content.decode()

    def count(self, method: str, path: str) -> int:
        return sum(m == method and bool(re.search(path, p)) for m, p in self.requests)

    def uploads(self) -> Counter:
        """Counts how often each large file was sent."""
        return Counter(p for m, p in self.requests if m == "PUT")


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Keeps the tests' output quiet."""

    def _serve(self):
        self.path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
        length = int(self.headers.get("Content-Length") or 0)
        if self._fault(length):
            return
        body = self.rfile.read(length) if length else self._read_chunks()
        try:
            with self.hub.lock:
                self._route(body)
        except Refusal as refusal:
            self._refuse(refusal)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_chunks(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fault(self, length: int) -> bool:
        for fault in list(self.hub.faults):
            method, pattern, after, status = fault
            if method != self.command or not pattern.search(self.path):
                continue
            if after:
                fault[2] -= 1
                return False
            self.hub.faults.remove(fault)
            if status is None:
                self.rfile.read(length // 2)
                self.close_connection = True
            else:
                self.rfile.read(length)
                self._refuse(Refusal(status, "planted fault"))
            return True
        return False

    def _route(self, body: bytes):
        routes = (
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/([0-9a-f]{64})", self._put),
            ("POST", r"/large/([0-9a-f]{64})/verify", self._verify),
            ("GET|HEAD", r"/large/([0-9a-f]{64})", self._get_large),
            ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        )
        for method, pattern, action in routes:
            match = re.fullmatch(pattern, self.path)
            if self.command in method.split("|") and match:
                return action(body, *match.groups())
        raise Refusal(501, f"not of this Hub: {self.command} {self.path}")

    # Publishing.

    def _create(self, body: bytes):
        self._expect_token()
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0"}
        if repo_id in self.hub.repositories:
            return self._json(answer | {"error": "You already created this model repo"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        repository = Repository(bool(private))
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})
        self.hub.repositories[repo_id] = repository
        self._json(answer)

    def _validate(self, body: bytes):
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no YAML header"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _branch(self, body: bytes, repo_id: str, branch: str):
        self._expect_token()
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = repository.resolve(start)
        self._json({})

    def _preupload(self, body: bytes, repo_id: str, revision: str):
        self._expect_token()
        sha = self._sha(repo_id, revision)
        tree = self._repository(repo_id).trees[sha]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": tree[file["path"]].etag if file["path"] in tree else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files, "commitOid": sha})

    def _batch(self, body: bytes, repo_id: str):
        self._expect_token()
        self._repository(repo_id)
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large_files:
                place = f"{self.hub.url}/large/{asked['oid']}"
                actions = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
                answer["actions"] = actions
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "content does not match its SHA-256")
        self.hub.large_files[oid] = body
        self._send(200, b"")

    def _verify(self, body: bytes, oid: str):
        asked = json.loads(body)
        if len(self.hub.large_files.get(oid, b"")) != asked["size"]:
            raise Refusal(404, "no such object")
        self._json({})

    def _commit(self, body: bytes, repo_id: str, revision: str):
        self._expect_token()
        repository = self._repository(repo_id)
        tree = dict(repository.trees[self._sha(repo_id, revision)])
        for line in body.splitlines():
            operation = json.loads(line)
            self._apply(tree, operation["key"], operation["value"])
        sha = repository.commit(revision, tree)
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url})

    def _apply(self, tree: dict[str, Blob], key: str, value: dict):
        if key == "file":
            tree[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large_files:
                raise Refusal(400, f"LFS pointer to nothing: {value['path']}")
            tree[value["path"]] = Blob(self.hub.large_files[value["oid"]], value["oid"])
        elif key == "deletedFile":
            del tree[value["path"]]
        elif key != "header":
            raise Refusal(501, f"not of this Hub: {key}")

    # Reading.

    def _info(self, _, repo_id: str, revision: str | None = None):
        sha = self._sha(repo_id, revision or "main")
        repository = self._repository(repo_id)
        self._json(
            {
                "_id": "0",
                "id": repo_id,
                "modelId": repo_id,
                "sha": sha,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": path} for path in repository.trees[sha]],
            }
        )

    def _tree(self, _, repo_id: str, revision: str, folder: str | None = None):
        tree = self._repository(repo_id).trees[self._sha(repo_id, revision)]
        prefix = f"{folder}/" if folder else ""
        found = {path: blob for path, blob in tree.items() if path.startswith(prefix)}
        if folder and not found:
            raise Refusal(404, "no such folder", "EntryNotFound")
        self._json([_tree_entry(path, blob) for path, blob in found.items()])

    def _resolve(self, _, repo_id: str, revision: str, path: str):
        sha = self._sha(repo_id, revision)
        blob = self._repository(repo_id).trees[sha].get(path)
        if blob is None:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound")
        headers = {"ETag": f'"{blob.git_id}"', "X-Repo-Commit": sha}
        if blob.oid is None:
            return self._send(200, blob.content, headers)
        headers |= {
            "X-Linked-ETag": f'"{blob.oid}"',
            "X-Linked-Size": str(len(blob.content)),
            "Location": f"{self.hub.storage_url}/large/{blob.oid}",
        }
        self._send(302, b"", headers)

    def _get_large(self, _, oid: str):
        if oid not in self.hub.large_files:
            raise Refusal(404, "no such object")
        content, status, headers = self.hub.large_files[oid], 200, {"ETag": f'"{oid}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers)

    # Answers.

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._has_token()):
            raise Refusal(
                401 if not self._has_token() else 404, "no such repository", "RepoNotFound"
            )
        return repository

    def _sha(self, repo_id: str, revision: str) -> str:
        sha = self._repository(repo_id).resolve(revision)
        if sha is None:
            raise Refusal(404, f"no such revision: {revision}", "RevisionNotFound")
        return sha

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _expect_token(self):
        if not self._has_token():
            raise Refusal(401, "Invalid username or password.")

    def _json(self, content, status: int = 200):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, refusal: Refusal):
        headers = {"Content-Type": "application/json", "X-Error-Message": str(refusal)}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree_entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_id}
    if blob.oid is not None:
        entry["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 134}
    return entry
