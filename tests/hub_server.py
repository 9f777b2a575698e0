"""A Hub on loopback: what `huggingface_hub`, `datasets` and `timm` ask for, and nothing more. Standard library only.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.env(tmp_path)})
        hub.files("me/model")                       # what was committed
        hub.commits("me/data", repo_type="dataset") # and how
        hub.fail("GET /store", "drop", times=2)     # what goes wrong, and how often

The libraries read their endpoint when they are imported, so a client is a process that was started with `env`. Files
go by LFS (git's large file storage), as without Xet. The server is strict: it refuses what the real one refuses
silently or later: bytes that are not what their checksum says, a token sent to the file store, a card without YAML.
"""

import base64
import hashlib
import http.server
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".jpg", ".onnx", ".bin", ".npy", ".gz", ".zip")


@dataclass
class Repo:
    private: bool
    commits: list[dict] = field(default_factory=list)  # oid, title, branch, files
    branches: dict[str, str] = field(default_factory=dict)  # name or tag -> oid
    pull_requests: int = 0

    def commit(self, title: str, branch: str, files: dict[str, bytes]) -> str:
        content = json.dumps([len(self.commits), title, sorted(files)]).encode()
        oid = hashlib.sha1(content + b"".join(files.values())).hexdigest()
        self.commits.append({"oid": oid, "title": title, "branch": branch, "files": files})
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> dict | None:
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit["oid"] == oid), None)


class HubServer:
    """Serves while its context is open.

    Attributes:
        tokens: token -> (user, "write" or "read").
        repos: (repo type, id) -> `Repo`.
        requests: method and path of every request, in order.
    """

    def __init__(self, tokens: dict[str, tuple[str, str]] | None = None):
        self.tokens = tokens or {"hf_write": ("me", "write"), "hf_read": ("guest", "read")}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.storage: dict[str, bytes] = {}  # sha256 -> content
        self.requests: list[str] = []
        self.faults: list[list] = []  # [pattern, what, times left]
        self.stalled, self.go_on = threading.Event(), threading.Event()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.store = f"http://localhost:{self._server.server_port}"  # another origin, as of the real Hub's files

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def env(self, home: Path | str, token: str | None = "hf_write") -> dict[str, str]:
        """Environment variables of a client, whose caches are below `home`."""
        env = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_DATASETS_CACHE": str(Path(home, "datasets")),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }
        return env | ({"HF_TOKEN": token} if token else {})

    def fail(self, pattern: str, what: str | int, times: int = 1) -> None:
        """Lets requests go wrong whose "METHOD path" the pattern is found in.

        Args:
            pattern: regular expression.
            what: a status, 500 say; "drop" to close the connection in the midst of the answer; "damage" to answer with
                other bytes of the same length; "stall" to stop in its midst, set `stalled` and wait for `go_on`;
                "meanwhile" to let somebody else commit first and then to answer as usual.
            times: so often.
        """
        self.faults.append([pattern, what, times])

    def _fault(self, request: str) -> str | int | None:
        for fault in self.faults:
            if fault[2] > 0 and re.search(fault[0], request):
                fault[2] -= 1
                return fault[1]
        return None

    def create(self, repo: str, files: dict[str, bytes] | None = None, *, repo_type="model", private=False) -> Repo:
        """A repository as if somebody had made it."""
        made = self.repos[repo_type, repo] = Repo(private)
        made.commit("initial commit", "main", {".gitattributes": b"", **(files or {})})
        return made

    def files(self, repo: str, *, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Files of a repository."""
        return self.repos[repo_type, repo].at(revision)["files"]

    def commits(self, repo: str, *, repo_type: str = "model") -> list[str]:
        """Titles of its commits, oldest first."""
        return [commit["title"] for commit in self.repos[repo_type, repo].commits]


class _Answer(Exception):
    """Ends a request."""

    def __init__(self, status: int, body: dict | list | bytes = b"", **headers: str):
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _missing(code: str, **headers: str) -> _Answer:
    return _Answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)


class _Handler(http.server.BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _serve(self) -> None:
        self.hub = self.server_hub
        self.hub.requests.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.content = self.rfile.read(length)
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.fault = self.hub._fault(self.hub.requests[-1])
        try:
            if isinstance(self.fault, int):
                raise _Answer(self.fault, {"error": "the server is not well"})
            if self.fault == "meanwhile":
                repo = next(repo for (_, id), repo in self.hub.repos.items() if f"/{id}/" in self.path)
                repo.commit("somebody else's", "main", repo.at("main")["files"] | {"other.txt": b"theirs"})
            for method, pattern, route in _ROUTES:
                match = re.fullmatch(pattern, unquote(url.path))
                if match and self.command in method.split():
                    route(self, **match.groupdict())
            raise _Answer(404, {"error": f"no route {self.command} {self.path}"})
        except _Answer as answer:
            self._send(answer)
        except Exception as error:  # a bug here must not look like a hanging client
            self._send(_Answer(500, {"error": repr(error)}))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, answer: _Answer) -> None:
        is_json = not isinstance(answer.body, bytes)
        body = json.dumps(answer.body).encode() if is_json else answer.body
        if self.fault == "drop" and not body:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
        self.send_header("Content-Length", answer.headers.pop("Content-Length", str(len(body))))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "damage":
            body = bytes(255 - byte for byte in body)
        if self.fault in ("drop", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if self.fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.hub.stalled.set()
            self.hub.go_on.wait(60)
            body = body[len(body) // 2 :]
        self.wfile.write(body)

    # Who asks, and for what.

    def user(self, *, write: bool = False) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Answer(401, {"error": "Invalid token"})
        name, role = self.hub.tokens.get(token, (None, None))
        if write and role != "write":
            raise _Answer(403 if name else 401, {"error": "You need a token with the right to write"})
        return name

    def repo(self, kind: str, id: str, *, write: bool = False) -> Repo:
        user = self.user(write=write)
        repo = self.hub.repos.get((kind.removesuffix("s") or "model", id))
        if repo is None or (repo.private and user != id.partition("/")[0]):
            raise _missing("RepoNotFound")
        return repo

    def json(self) -> dict:
        return json.loads(self.content or b"{}")

    # Routes.

    def add_fault(self):  # not of the real Hub: a client asks for its next misfortune
        asked = self.json()
        self.hub.fail(**asked) if asked else self.hub.faults.clear()
        raise _Answer(200, {})

    def whoami(self):
        name = self.user()
        if not name:
            raise _Answer(401, {"error": "Unauthorized"})
        role = self.hub.tokens[self.headers["Authorization"].removeprefix("Bearer ")][1]
        token = {"displayName": "t", "role": role}
        raise _Answer(200, {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": token}})

    def create(self):
        user, asked = self.user(write=True), self.json()
        kind, id = asked.get("type") or "model", f"{asked.get('organization') or user}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{'datasets/' * (kind == 'dataset')}{id}"}
        if (kind, id) in self.hub.repos:
            raise _Answer(409, {"error": "You already created this repo", **url})
        self.hub.create(id, repo_type=kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        raise _Answer(200, url)

    def delete(self):
        user, asked = self.user(write=True), self.json()
        id = f"{asked.get('organization') or user}/{asked['name']}"
        self.repo(asked.get("type") or "model", id, write=True)
        del self.hub.repos[asked.get("type") or "model", id]
        raise _Answer(200, {})

    def validate_yaml(self):
        ok = re.match(r"---\n.*?\n---\n", self.json()["content"], re.DOTALL)
        errors = [] if ok else [{"message": "the card has no YAML"}]
        raise _Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, kind: str, id: str, revision: str | None = None):
        repo = self.repo(kind, id)
        commit = repo.at(revision or "main")
        if commit is None:
            raise _missing("RevisionNotFound")
        siblings = [{"rfilename": path} for path in sorted(commit["files"])]
        if self.query.get("blobs"):
            for sibling in siblings:
                sibling |= _about(sibling["rfilename"], commit["files"][sibling["rfilename"]], id_key="blobId")
        about = {"id": id, "sha": commit["oid"], "author": id.partition("/")[0], "private": repo.private}
        about |= {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        raise _Answer(200, about)

    def tree(self, kind: str, id: str, revision: str, path: str | None = None):
        commit = self.repo(kind, id).at(revision)
        if commit is None:
            raise _missing("RevisionNotFound")
        root = f"{path}/" if path else ""
        recursive = self.query.get("recursive", "false").lower() in ("true", "1")
        entries = {}
        for name, content in commit["files"].items():
            if not name.startswith(root):
                continue
            parents = name[len(root) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(2, len(parents) + 1)):
                folder = root + "/".join(parents[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if recursive or not parents:
                entries[name] = {"type": "file", "path": name, **_about(name, content)}
        if not entries:
            raise _missing("EntryNotFound")
        last = {"id": commit["oid"], "title": commit["title"], "date": "2026-01-01T00:00:00.000Z"}
        if self.query.get("expand", "false").lower() in ("true", "1"):
            entries = {name: entry | {"lastCommit": last} for name, entry in entries.items()}
        raise _Answer(200, [entries[name] for name in sorted(entries)])

    def paths_info(self, kind: str, id: str, revision: str):
        commit = self.repo(kind, id).at(revision)
        if commit is None:
            raise _missing("RevisionNotFound")
        if "json" in self.headers.get("Content-Type", ""):
            asked = self.json()["paths"]
        else:
            asked = parse_qs(self.content.decode()).get("paths", [])
        files = commit["files"]
        raise _Answer(
            200, [{"type": "file", "path": path, **_about(path, files[path])} for path in asked if path in files]
        )

    def refs(self, kind: str, id: str):
        branches = self.repo(kind, id).branches.items()
        named = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        raise _Answer(200, {"branches": named, "converts": [], "tags": []})

    def commit_list(self, kind: str, id: str, revision: str):
        commits = reversed(self.repo(kind, id).commits)
        about = {"message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
        raise _Answer(200, [{"id": c["oid"], "title": c["title"], **about} for c in commits])

    def branch(self, kind: str, id: str, name: str):
        repo = self.repo(kind, id, write=True)
        if self.command == "DELETE":
            repo.branches.pop(name, None)
            raise _Answer(200, {})
        if name in repo.branches:
            raise _Answer(409, {"error": "Reference already exists"})
        start = repo.at(self.json().get("startingPoint") or "main")
        if start is None:
            raise _missing("RevisionNotFound")
        repo.branches[name] = start["oid"]
        raise _Answer(200, {})

    def preupload(self, kind: str, id: str, revision: str):
        commit = self.repo(kind, id, write=True).at(revision)
        if commit is None:
            raise _missing("RevisionNotFound")
        files = []
        for asked in self.json()["files"]:
            lfs = asked["path"].endswith(LFS_SUFFIXES) and asked["size"] > 0
            entry = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if asked["path"] in commit["files"]:
                about = _about(asked["path"], commit["files"][asked["path"]])
                entry["oid"] = about["lfs"]["oid"] if "lfs" in about else about["oid"]
            files.append(entry)
        raise _Answer(200, {"files": files})

    def lfs_batch(self, id: str, kind: str | None = None):
        self.repo(kind or "model", id, write=True)
        objects = []
        for asked in self.json()["objects"]:
            action = {"upload": {"href": f"{self.hub.store}/store/{asked['oid']}"}}
            known = asked["oid"] in self.hub.storage
            objects.append({"oid": asked["oid"], "size": asked["size"], **({} if known else {"actions": action})})
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def put_object(self, oid: str):
        if self.headers.get("Authorization"):
            raise _Answer(400, {"error": "a token was sent to the file store"})
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise _Answer(400, {"error": "the bytes are not what their checksum says"})
        self.hub.storage[oid] = self.content
        raise _Answer(200)

    def get_object(self, oid: str):
        if self.headers.get("Authorization"):
            raise _Answer(400, {"error": "a token was sent to the file store"})
        self._send_content(self.hub.storage[oid], {"ETag": f'"{oid}"'})

    def commit(self, kind: str, id: str, revision: str):
        repo = self.repo(kind, id, write=True)
        lines = [json.loads(line) for line in self.content.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = repo.at(revision)
        if parent is None:
            raise _missing("RevisionNotFound")
        if header.get("parentCommit", parent["oid"]) != parent["oid"]:
            raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(parent["files"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise _Answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.hub.storage[value["oid"]]
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    raise _missing("EntryNotFound")
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {name: c for name, c in files.items() if not name.startswith(value["path"].rstrip("/") + "/")}
        url = f"{self.hub.endpoint}/{'datasets/' * (kind == 'datasets')}{id}"
        body = {"success": True}
        if self.query.get("create_pr") in ("1", "true"):
            repo.pull_requests += 1
            revision = f"refs/pr/{repo.pull_requests}"
            body["pullRequestUrl"] = f"{url}/discussions/{repo.pull_requests}"
        oid = repo.commit(header["summary"], revision, files)
        raise _Answer(200, body | {"commitOid": oid, "commitUrl": f"{url}/commit/{oid}"})

    def resolve(self, id: str, revision: str, path: str, kind: str | None = None):
        commit = self.repo(kind or "model", id).at(revision)
        if commit is None:
            raise _missing("RevisionNotFound")
        found = {"X-Repo-Commit": commit["oid"]}
        if path not in commit["files"]:
            raise _missing("EntryNotFound", **found)
        content = commit["files"][path]
        about = _about(path, content)
        if "lfs" not in about:
            self._send_content(content, found | {"ETag": f'"{about["oid"]}"'})
        oid = about["lfs"]["oid"]
        self.hub.storage[oid] = content
        found |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        raise _Answer(302, b"", Location=f"{self.hub.store}/store/{oid}", **found)

    def _send_content(self, content: bytes, headers: dict[str, str]):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers |= {"Accept-Ranges": "bytes"}
        if not wanted:
            raise _Answer(200, content, **{"Content-Length": str(len(content))}, **headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        part = content[start : end + 1]
        raise _Answer(206, part, **{"Content-Range": f"bytes {start}-{end}/{len(content)}"}, **headers)


def _about(path: str, content: bytes, id_key: str = "oid") -> dict:
    """Size and object ids of a file."""
    about = {"size": len(content), id_key: hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if path.endswith(LFS_SUFFIXES) and content:
        about["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        about["lfs"] |= {"sha256": about["lfs"]["oid"]}
    return about


_ID, _REVISION = r"(?P<id>[^/]+/[^/]+)", r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
_WEB = rf"/(?:(?P<kind>datasets)/)?{_ID}"
_ROUTES = [
    ("POST", "/faults", _Handler.add_fault),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("DELETE", "/api/repos/delete", _Handler.delete),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET HEAD", rf"{_API}", _Handler.info),
    ("GET HEAD", rf"{_API}/revision/{_REVISION}", _Handler.info),
    ("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/{_REVISION}", _Handler.paths_info),
    ("GET", rf"{_API}/refs", _Handler.refs),
    ("GET", rf"{_API}/commits/{_REVISION}", _Handler.commit_list),
    ("POST DELETE", rf"{_API}/branch/(?P<name>.+)", _Handler.branch),
    ("POST", rf"{_API}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/store/(?P<oid>[0-9a-f]{64})", _Handler.put_object),
    ("GET HEAD", "/store/(?P<oid>[0-9a-f]{64})", _Handler.get_object),
    ("POST", rf"{_API}/commit/{_REVISION}", _Handler.commit),
    ("GET HEAD", rf"{_WEB}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
