"""A Hub of a few hundred lines on the loopback, for the real huggingface_hub and timm to speak to; faults on demand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCardData, SpaceCardData
from huggingface_hub.repocard import RepoCard

ROLES = {"hf_writes_1234567890": "write", "hf_reads_1234567890": "read"}
WRITE, READ = ROLES
USER, ORGANISATION = "user", "team"  # of both tokens
SPACE = "space:"  # a Space's name among the repositories begins with this
LICENSES = ("apache-2.0", "mit", "cc-by-nc-4.0", "gemma", "other", "unknown")  # some of the Hub's


@dataclass
class Repo:
    """Commits, oldest first, each a whole tree of path to bytes; branches and tags point to them."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return next(((oid, files) for oid, _, files in self.commits if oid == sha), None)

    def commit(self, branch: str, title: str, files: dict[str, bytes], deleted: set[str] = frozenset()) -> str:
        before = self.tree(branch)
        whole = {**(before[1] if before else {}), **files}
        whole = {name: content for name, content in whole.items() if name not in deleted}
        oid = hashlib.sha1(f"{len(self.commits)} {title} {sorted(whole)}".encode()).hexdigest()
        self.commits.append((oid, title, whole))
        self.branches[branch] = oid
        return oid


class Hub:
    """The server's state. `faults` maps a kind of request ("create", "put", "commit", ...) to what is answered instead, one after
    the other, and `always` to what is answered for good: a status, "close" for a connection that ends, 0 for no fault."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.always: dict[str, int | str] = {}
        self.slow = 0.0  # seconds that an upload takes
        self.asked: list[str] = []  # the kinds of all requests
        hub = self

        class Bound(Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Puts files into a repository, as somebody else's push would."""
        return self.repos.setdefault(repo_id, Repo()).commit(branch, "add", files)

    def env(self, home, token: str | None = WRITE) -> dict[str, str]:
        """What a client's process needs to speak to this Hub alone, with an empty cache in `home`."""
        given = {"HF_TOKEN": token} if token else {}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
                "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", **given}  # fmt: skip


LFS_SIZE = 10_000  # as the Hub: small text is kept in git, larger or binary files beside it


class Handler(BaseHTTPRequestHandler):
    """One request; `state` is the Hub that it belongs to."""

    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, body=None, headers=None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in {**own, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(data)

    def error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply(status, {"error": message}, headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def role(self) -> str | None:
        """What the token of the request allows; None without a valid one."""
        return ROLES.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def faulty(self, kind: str) -> bool:
        """Notes the request; answers it by the fault that waits for it, if one does."""
        self.state.asked.append(kind)
        waiting = self.state.faults.get(kind)
        fault = waiting.pop(0) if waiting else self.state.always.get(kind, 0)
        if fault == "close":
            if kind == "put":
                self.rfile.read(1000)  # some of it arrives
            self.close_connection = True
            self.connection.close()
            return True
        if fault == 0:
            return False
        if kind != "answer":
            self.body()
        self.error(int(fault), None, "fault")
        return True

    def may_write(self, repo_id: str) -> bool:
        namespace = repo_id.removeprefix(SPACE).split("/")[0]
        if self.role() is None:
            self.error(401, None, "Invalid credentials in Authorization header")
        elif self.role() == "read" or namespace not in (USER, ORGANISATION):
            self.error(403, None, f"You don't have the rights to create a model under the namespace {namespace!r}")
        else:
            return True
        return False

    def found(self, repo_id: str, revision: str = "main"):
        """(repository, sha, files), or None after an error was sent."""
        repo = self.state.repos.get(repo_id)
        if repo is None or (repo.private and self.role() is None):
            self.error(401 if self.role() is None else 404, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and self.path.count("/resolve/"):
            self.error(403, "GatedRepo", "Access to this model is restricted")
            return None
        tree = repo.tree(revision)
        if tree is None:
            self.error(404, "RevisionNotFound", "Invalid rev id")
            return None
        return repo, *tree

    def asked_path(self) -> str:
        """The path, with a Space as the repository ``space:USER/NAME`` among the models."""
        path = unquote(urlsplit(self.path).path)
        return path.replace("/api/spaces/", f"/api/models/{SPACE}").replace("/spaces/", f"/{SPACE}")

    def do_POST(self) -> None:
        path = self.asked_path()
        rules = (
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate_yaml),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/verify", self.verify),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
        )
        for pattern, rule in rules:
            match = re.fullmatch(pattern, path)
            if match:
                if not self.faulty(rule.__name__):
                    rule(*match.groups())
                return
        self.body()
        self.error(404, None, f"no such route: {path}")

    def create(self) -> None:
        asked = json.loads(self.body())
        space = asked.get("type") == "space"
        name = f"{SPACE * space}{asked.get('organization') or USER}/{asked['name']}"
        if space and asked.get("sdk") not in ("gradio", "docker", "static"):
            return self.error(400, None, "expected an sdk")
        if not self.may_write(name):
            return
        url = f"{self.state.url}/{name.replace(SPACE, 'spaces/')}"
        if name in self.state.repos:
            return self.reply(409, {"url": url, "error": "You already created this model repo"})
        repo = self.state.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.reply(200, {"url": url})

    def validate_yaml(self) -> None:
        asked = json.loads(self.body())
        content, space = asked["content"], asked["repoType"] == "space"
        try:
            data = RepoCard(content).data.to_dict()
            data.pop("model-index", None)
            (SpaceCardData if space else ModelCardData)(**data)
            known = data.get("license") in (None, *LICENSES)
            names = [*data.get("datasets", []), *([data["base_model"]] if "base_model" in data else [])]
            rules = {
                "tags must be a list": isinstance(data.get("tags"), list),
                '"library_name" is missing': space or bool(data.get("library_name")),
                '"sdk" is missing': not space or bool(data.get("sdk")),
                f'"license" must be one of [{", ".join(LICENSES)}]': known,
                # The Hub's documentation asks for it; whether its check does is not known.
                '"license_name" is missing': data.get("license") != "other" or bool(data.get("license_name")),
                "not an id": all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in names),
            }
            errors = [text for text, held in rules.items() if not held]
        except Exception as error:
            errors = [str(error)]
        self.reply(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        asked = json.loads(self.body())
        if not self.may_write(repo_id):
            return
        found = self.found(repo_id, revision)
        if found is None:
            return
        answer = []
        for file in asked["files"]:
            have = found[2].get(file["path"])
            large = file["size"] > LFS_SIZE
            oid = None
            if have is not None:
                oid = hashlib.sha256(have).hexdigest() if large else git_oid(have)
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": answer})

    def batch(self, repo_id: str) -> None:
        asked = json.loads(self.body())
        answer = []
        for thing in asked["objects"]:
            places = {"upload": f"store/{thing['oid']}", "verify": "verify"}
            actions = {what: {"href": f"{self.state.url}/{place}"} for what, place in places.items()}
            answer.append(thing if thing["oid"] in self.state.objects else {**thing, "actions": actions})
        self.reply(200, {"transfer": "basic", "objects": answer})

    def do_PUT(self) -> None:
        if self.faulty("put"):
            return
        content = self.body()
        time.sleep(self.state.slow)
        assert "Authorization" not in self.headers
        self.state.objects[self.path.rsplit("/", 1)[-1]] = content
        self.reply(200)

    def verify(self) -> None:
        asked = json.loads(self.body())
        content = self.state.objects.get(asked["oid"])
        whole = content is not None and hashlib.sha256(content).hexdigest() == asked["oid"]
        self.reply(200 if whole else 422)

    def commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line]
        if not self.may_write(repo_id):
            return
        found = self.found(repo_id, revision)
        if found is None:
            return
        title, files, deleted = "", {}, set()
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, found[1]):
                    return self.error(412, None, "A commit has happened since")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                if value["path"] not in found[2]:
                    return self.error(404, "EntryNotFound", f"no such file: {value['path']}")
                deleted.add(value["path"])
        oid = found[0].commit(revision, title, files, deleted)
        if self.faulty("answer"):  # carried out, and not told
            return
        place = f"{self.state.url}/{repo_id.replace(SPACE, 'spaces/')}"
        self.reply(200, {"commitUrl": f"{place}/commit/{oid}", "commitOid": oid, "success": True})

    def branch(self, repo_id: str, name: str) -> None:
        self.body()
        if not self.may_write(repo_id):
            return
        found = self.found(repo_id)
        if found is None:
            return
        if name in found[0].branches:
            return self.error(409, None, "Reference already exists")
        found[0].branches[name] = found[1]
        self.reply(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.asked_path()
        if path == "/api/whoami-v2":
            if self.faulty("whoami"):
                return
            if self.role() is None:
                return self.error(401, None, "Invalid credentials in Authorization header")
            token = {"accessToken": {"role": self.role(), "displayName": "test"}}
            return self.reply(200, {"type": "user", "name": USER, "orgs": [{"name": ORGANISATION}], "auth": token})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/xet-write-token/.+", path):
            if self.faulty("xet"):
                return None
            nobody = {"casUrl": "http://127.0.0.1:9", "accessToken": "xet", "exp": int(time.time()) + 600}
            return self.reply(200, nobody)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match:
            return None if self.faulty("resolve") else self.resolve(*match.groups())
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        if match:
            found = self.found(match[1], match[2] or "main")
            if found is not None:
                siblings = [{"rfilename": name} for name in found[2]]
                about = {"id": match[1].removeprefix(SPACE), "sha": found[1], "siblings": siblings, "tags": []}
                card = RepoCard(found[2].get("README.md", b"").decode(), ignore_metadata_errors=True).data.to_dict()
                self.reply(200, {**about, "cardData": card, "private": found[0].private})
            return None
        return self.error(404, None, f"no such route: {path}")

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self.found(repo_id, revision)
        if found is None:
            return
        _, sha, files = found
        if name not in files:
            return self.error(404, "EntryNotFound", "Entry not found")
        content = files[name]
        large = len(content) > LFS_SIZE
        digest = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{digest if large else git_oid(content)}"'}
        if large:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self.reply(200, content, headers)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
