"""A stand-in for the Hub on this machine, which speaks the part of its HTTP API that saving and loading models takes."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin")


class Hub(ThreadingHTTPServer):
    """
    Serves from memory while it is a context. `repositories` holds the history of every branch, oldest first: pairs of a
    commit and its files, by path.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, list[tuple[str, dict[str, bytes]]]]] = {}
        self.large_files: dict[str, bytes] = {}

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.shutdown()
        self.server_close()

    def get_files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[name][revision][-1][1]


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        if not isinstance(body, bytes):
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "large":
            self.answer(200, self.server.large_files[parts[1]], {"ETag": f'"{parts[1]}"'})
        elif parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            revision = rest[1] if len(rest) > 1 else "main"
            found = self.find(name, revision)
            if found is None:
                return
            commit, files = found
            if rest[:1] == ["tree"]:
                folder = "/".join([*rest[2:], ""])
                inside = [path for path in files if path.startswith(folder)]
                if folder and not inside:
                    self.refuse(404, "EntryNotFound")
                else:
                    self.answer(200, [self.describe(path, files[path]) for path in inside])
            elif rest[:1] in ([], ["revision"]):
                siblings = [{"rfilename": path} for path in files]
                self.answer(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})
            else:
                self.refuse(404, "EntryNotFound")
        elif parts[2:3] == ["resolve"]:
            found = self.find("/".join(parts[:2]), parts[3])
            if found is not None:
                self.resolve(found[0], found[1].get("/".join(parts[4:])), "/".join(parts[4:]))
        else:
            self.refuse(404, "EntryNotFound")

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A branch's newest commit, or the commit itself. Answers the request if there is none."""
        if name not in self.server.repositories:
            self.refuse(404, "RepoNotFound")
            return None
        branches = self.server.repositories[name]
        if revision in branches:
            return branches[revision][-1]
        for history in branches.values():
            for commit, files in history:
                if commit == revision:
                    return commit, files
        self.refuse(404, "RevisionNotFound")
        return None

    def describe(self, path: str, content: bytes) -> dict:
        description = {"type": "file", "path": path, "size": len(content), "oid": get_git_hash(content)}
        if path.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(content).hexdigest()
            description["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        return description

    def resolve(self, commit: str, content: bytes | None, path: str) -> None:
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self.answer(404, {"error": "EntryNotFound"}, {**headers, "X-Error-Code": "EntryNotFound"})
        elif path.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(content).hexdigest()
            # On another host, as the Hub's storage is.
            location = f"http://localhost:{self.server.server_port}/large/{oid}"
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Location": location}
            self.answer(302, b"", {**headers, **linked})
        else:
            self.answer(200, content, {**headers, "ETag": f'"{get_git_hash(content)}"'})

    def do_PUT(self) -> None:
        oid = self.path.split("/")[-1]
        content = self.read_body()
        if hashlib.sha256(content).hexdigest() != oid:
            self.refuse(400, "BadRequest")
            return
        self.server.large_files[oid] = content
        self.answer(200)

    def do_POST(self) -> None:
        body = self.read_body()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts == ["api", "validate-yaml"]:
            self.answer(200, {"errors": [], "warnings": []})
        elif not self.headers.get("Authorization"):
            self.refuse(401, "Unauthorized")
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            self.prepare_large_files(json.loads(body))
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            self.prepare_upload("/".join(parts[2:4]), parts[5], json.loads(body))
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            self.commit("/".join(parts[2:4]), parts[5], [json.loads(line) for line in body.splitlines()])
        elif parts[:2] == ["api", "models"] and parts[4] == "branch":
            branches = self.server.repositories["/".join(parts[2:4])]
            if parts[5] in branches:
                self.refuse(409, "Conflict")
            else:
                branches[parts[5]] = list(branches["main"])
                self.answer(201, {})
        else:
            self.refuse(404, "EntryNotFound")

    def create(self, request: dict) -> None:
        name = f"{request.get('organization') or 'somebody'}/{request['name']}"
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": url})
            return
        self.server.repositories[name] = {"main": [("0" * 40, {})]}
        self.answer(200, {"url": url, "name": name, "id": name})

    def prepare_upload(self, name: str, revision: str, request: dict) -> None:
        found = self.find(name, revision)
        if found is None:
            return
        files = []
        for file in request["files"]:
            path, is_large = file["path"], file["path"].endswith(LFS_SUFFIXES)
            entry = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if path in found[1]:
                content = found[1][path]
                entry["oid"] = hashlib.sha256(content).hexdigest() if is_large else get_git_hash(content)
            files.append(entry)
        self.answer(200, {"files": files})

    def prepare_large_files(self, request: dict) -> None:
        objects = []
        for requested in request["objects"]:
            entry = {"oid": requested["oid"], "size": requested["size"], "authenticated": True}
            if requested["oid"] not in self.server.large_files:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/large/{requested['oid']}"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, revision: str, lines: list[dict]) -> None:
        found = self.find(name, revision)
        if found is None:
            return
        files = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        history = self.server.repositories[name][revision]
        commit = hashlib.sha1(f"{name}/{revision}/{len(history)}".encode()).hexdigest()
        history.append((commit, files))
        url = f"{self.server.endpoint}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": commit})


def get_git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
