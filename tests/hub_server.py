"""A small Hugging Face Hub on the loopback address, for tests with the real `huggingface_hub` client.

It speaks as much of the Hub's HTTP interface as pushing and loading a model needs: accounts, repositories, branches,
commits, uploads of large files by the basic Git LFS transfer, listings and downloads. Everything stays in memory.

    with FakeHub() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(cache_folder)})
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN = "me", "hf_loopback"
LARGE_FILES = (".safetensors", ".bin", ".pt")  # what goes by LFS, as in a new repository of the real Hub

REPO, REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = (  # method, path (its parts still percent-encoded, as a revision may hold slashes), method of FakeHub
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create_repo"),
    ("GET", f"/api/models/{REPO}", "repo_info"),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", "repo_info"),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(?P<folder>/.*)?", "list_tree"),
    ("POST", f"/api/models/{REPO}/branch/{REVISION}", "create_branch"),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
)


@dataclass
class Request:
    body: bytes
    query: dict[str, list[str]]
    headers: dict[str, str]

    def json(self):
        return json.loads(self.body or b"{}")


@dataclass
class Reply:
    body: bytes | dict | list = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An error reply; clients tell what is missing by `code`."""

    def __init__(self, status: int, code: str, headers: dict[str, str] | None = None):
        super().__init__(f"{status} {code}")
        self.reply = Reply({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})


@dataclass
class Commit:
    oid: str
    title: str
    parent: str | None
    files: dict[str, str]  # path to key in `FakeHub.contents`: 40 digits (git) or 64 (LFS)


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name to commit
    commits: dict[str, Commit] = field(default_factory=dict)


class FakeHub:
    """A running server; `repos`, `contents` and `log` (method, path, status of each request) are there to be read."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.contents: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables that make a client process use this server, with its caches in a folder of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def answer(self, method: str, target: str, request: Request) -> Reply:
        path = urlsplit(target).path
        try:
            for verb, pattern, name in ROUTES:
                match = re.fullmatch(pattern, path) if verb == method else None
                if match:
                    parts = {key: unquote(part) for key, part in match.groupdict().items() if part is not None}
                    with self.lock:
                        self.authorize(method, name, request, parts.get("repo_id"))
                        reply = getattr(self, name)(request, **parts)
                    break
            else:
                raise HubError(501, "NoSuchRoute")
        except HubError as error:
            reply = error.reply
        self.log.append((method, unquote(path), reply.status))
        return reply

    def authorize(self, method: str, name: str, request: Request, repo_id: str | None):
        """Public repositories are open to readers; uploads come without a token, as to a presigned address."""
        repo = self.repos.get(repo_id)
        open_to_all = name == "lfs_upload" or (method in ("GET", "HEAD") and repo is not None and not repo.private)
        if not open_to_all and request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "RepoNotFound" if repo_id else "InvalidToken")
        if repo_id and repo is None:
            raise HubError(404, "RepoNotFound")

    def find(self, repo_id: str, revision: str) -> Commit:
        repo = self.repos[repo_id]
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise HubError(404, "RevisionNotFound")
        return repo.commits[oid]

    def add_commit(self, repo_id: str, branch: str, title: str, files: dict[str, str]) -> str:
        repo = self.repos[repo_id]
        parent = repo.branches.get(branch)
        oid = hashlib.sha1(json.dumps([repo_id, branch, len(repo.commits), parent, title, files]).encode()).hexdigest()
        repo.commits[oid] = Commit(oid, title, parent, files)
        repo.branches[branch] = oid
        return oid

    # --- Account and repositories ---

    def whoami(self, request: Request) -> Reply:
        return Reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self, request: Request) -> Reply:
        return Reply({"errors": [], "warnings": []})

    def create_repo(self, request: Request) -> Reply:
        wanted = request.json()
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if repo_id in self.repos:
            return Reply({"url": f"{self.url}/{repo_id}", "error": "You already created this repo"}, 409)
        # One client version says it with `visibility`, another with `private`.
        self.repos[repo_id] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.add_commit(repo_id, "main", "initial commit", {})
        return Reply({"url": f"{self.url}/{repo_id}"})

    def repo_info(self, request: Request, repo_id: str, revision: str = "main") -> Reply:
        commit = self.find(repo_id, revision)
        info = {"id": repo_id, "sha": commit.oid, "private": self.repos[repo_id].private, "tags": [], "gated": False}
        return Reply({**info, "siblings": [{"rfilename": path} for path in sorted(commit.files)]})

    def list_tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> Reply:
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        commit = self.find(repo_id, revision)
        inside = {path: oid for path, oid in sorted(commit.files.items()) if path.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, "EntryNotFound")
        if request.query.get("recursive", ["false"])[0].lower() == "true":
            return Reply([self.entry(path, oid) for path, oid in inside.items()])
        entries = [self.entry(path, oid) for path, oid in inside.items() if "/" not in path[len(prefix) :]]
        folders = sorted({prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]})
        return Reply([*({"type": "directory", "path": path, "oid": "0" * 40} for path in folders), *entries])

    def entry(self, path: str, oid: str) -> dict:
        size = len(self.contents[oid])
        lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if len(oid) == 64 else {}
        return {"type": "file", "path": path, "size": size, "oid": oid[:40], **lfs}

    def create_branch(self, request: Request, repo_id: str, revision: str) -> Reply:
        if revision in self.repos[repo_id].branches:
            return Reply({"error": "Reference already exists"}, 409)
        self.repos[repo_id].branches[revision] = self.find(repo_id, request.json().get("startingPoint", "main")).oid
        return Reply({})

    # --- Uploads: ask how, send the large files, then commit all ---

    def preupload(self, request: Request, repo_id: str, revision: str) -> Reply:
        present = self.find(repo_id, revision).files
        files = []
        for file in request.json()["files"]:
            mode = "lfs" if file["path"].endswith(LARGE_FILES) else "regular"
            known = {"oid": present[file["path"]]} if file["path"] in present else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return Reply({"files": files})

    def lfs_batch(self, request: Request, repo_id: str) -> Reply:
        objects = []
        for item in request.json()["objects"]:
            url = f"{self.url}/lfs/{item['oid']}"
            actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append({**item, **({} if item["oid"] in self.contents else {"actions": actions})})
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, request: Request, oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "WrongChecksum")
        self.contents[oid] = request.body
        return Reply()

    def lfs_verify(self, request: Request, oid: str) -> Reply:
        if oid not in self.contents or len(self.contents[oid]) != request.json()["size"]:
            raise HubError(404, "NotUploaded")
        return Reply({})

    def commit(self, request: Request, repo_id: str, revision: str) -> Reply:
        if revision not in self.repos[repo_id].branches:
            raise HubError(404, "RevisionNotFound")
        title, files = "", dict(self.find(repo_id, revision).files)
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    content = base64.b64decode(value["content"])
                    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                    self.contents[oid] = content
                    files[value["path"]] = oid
                case "lfsFile":
                    if value["oid"] not in self.contents:
                        raise HubError(400, "NotUploaded")
                    files[value["path"]] = value["oid"]
                case "deletedFile":
                    files.pop(value["path"], None)
                case unknown:
                    raise HubError(400, f"UnknownOperation-{unknown}")
        oid = self.add_commit(repo_id, revision, title, files)
        return Reply({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}"})

    # --- Downloads ---

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        commit = self.find(repo_id, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", headers)
        oid = commit.files[path]
        content, headers["ETag"] = self.contents[oid], f'"{oid}"'
        if len(oid) == 64:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted is None:
            return Reply(content, 200, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Reply(content[first : last + 1], 206, headers)


def make_handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    """What turns bytes on the wire into calls of `hub.answer`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # clients keep connections open

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def handle_request(self):
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.read_body(), parse_qs(urlsplit(self.path).query), headers)
            reply = hub.answer(self.command, self.path, request)
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

        def log_message(self, *args): ...

    return Handler
