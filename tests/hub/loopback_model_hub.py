"""A stand-in for the writing half of the Hub's HTTP API on loopback: accounts, repositories, LFS, commits, and reading back.

What `huggingface_hub` 2.4 asks for in `create_repo`, `create_commit` (without Xet: HF_HUB_DISABLE_XET=1), `model_info`,
`list_repo_files`, `hf_hub_download` and transformers' `from_pretrained`. Datasets, and faults, are those of `LoopbackHub`; a
`Push` fault breaks uploads in ways of its own. Repositories live in memory, one linear history of commits each.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from typing import Any

from tests.hub.loopback_hub import LoopbackHub, _Handler

TOKEN = "hf_loopbackWriteToken42"


def git_oid(data: bytes) -> str:
    """The id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclasses.dataclass
class Account:
    """Whose token it is and what it may do, as `whoami-v2` says."""

    name: str = "me"
    role: str = "write"
    orgs: tuple[tuple[str, str], ...] = ()
    scoped: list[dict[str, Any]] | None = None

    def answer(self) -> dict[str, Any]:
        token: dict[str, Any] = {"displayName": "t", "role": self.role}
        if self.scoped is not None:
            token["fineGrained"] = {"scoped": self.scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.orgs]
        return {"type": "user", "name": self.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


@dataclasses.dataclass
class Push:
    """What goes wrong with writing: requests whose method and path hold `part`, the first `times` of them (None: all)."""

    part: str
    status: int | None = None
    how: str = ""
    """`reset` after `after` bytes of the body, or `stall` until the server ends."""
    after: int = 0
    times: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    met: int = 0

    def strikes(self, request: str) -> bool:
        if self.part not in request or (self.times is not None and self.met >= self.times):
            return False
        self.met += 1
        return True


class Repo:
    """One model repository: `commits` [(id, title)] of main, the files of every commit, and the newest of each branch."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.heads: dict[str, str] = {}
        self.commits: list[tuple[str, str]] = []
        self.trees: dict[str, dict[str, bytes]] = {}
        self.lfs: set[bytes] = set()
        self.commit("initial commit", {})

    def commit(self, title: str, files: dict[str, bytes], branch: str = "main") -> str:
        oid = hashlib.sha1(f"{len(self.trees)}{title}{sorted(files)}{time.time_ns()}".encode()).hexdigest()
        if branch == "main":
            self.commits.append((oid, title))
        self.heads[branch] = oid
        self.trees[oid] = files
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        return self.trees[self.commits[-1][0]]

    @property
    def titles(self) -> list[str]:
        return [title for _, title in self.commits[1:]]

    def at(self, revision: str) -> str | None:
        revision = "main" if revision == "HEAD" else revision
        return self.heads.get(revision) or (revision if revision in self.trees else None)


class LoopbackModelHub(LoopbackHub):
    """`models[repo_id]`; `accounts[token]`; `pushes`: faults of writing; `uploaded`: (path, bytes) of every LFS upload."""

    lfs_bytes = 4096
    """Larger files, and those with a NUL, go through LFS."""
    bytes_per_second: float | None = None
    """How fast uploads are taken in; None: as they come."""

    def __init__(self, port: int = 0) -> None:
        super().__init__()
        if port:
            self.server_close()
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_address = ("127.0.0.1", port)
            self.server_bind()
            self.server_activate()
        self.RequestHandlerClass = _ModelHandler
        self.models: dict[str, Repo] = {}
        self.accounts = {TOKEN: Account()}
        self.pushes: list[Push] = []
        self.blobs: dict[str, bytes] = {}
        self.put_bytes = 0
        self.writing = threading.RLock()

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """What a child process needs to take this for the Hub."""
        more = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return more | {"HF_TOKEN": token or "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": ""}


class _ModelHandler(_Handler):
    server: LoopbackModelHub

    def do_PUT(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(b"")

    # Bodies are read where they are needed: a fault may break one off in the middle.
    def _body(self, least: int | None = None) -> bytes:
        """The request's body, or its first `least` bytes."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
                if least is not None and len(data) >= least:
                    return data
            self.rfile.readline()
            return data
        length = int(self.headers.get("Content-Length") or 0)
        data, block = b"", 1 << 16
        while len(data) < min(length, least if least is not None else length):
            part = self.rfile.read(min(block, length - len(data)))
            if not part:
                break
            data += part
            if self.server.bytes_per_second and length > block:
                time.sleep(len(part) / self.server.bytes_per_second)
        return data

    def _reset(self) -> None:
        self.server.log.append(f"{self.command} {self.path} -> reset")
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _answer(self, body: bytes) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        for fault in self.server.pushes:
            if not fault.strikes(f"{self.command} {path}"):
                continue
            if fault.how == "reset":
                self._body(fault.after)
                self._reset()
            elif fault.how == "stall":
                self.server.log.append(f"{self.command} {self.path} -> stall")
                self.server.released.wait()
                self.close_connection = True
            else:
                self._body()
                self._send(fault.status or 500, b'{"error":"fault"}', {"X-Error-Message": "fault", **fault.headers})
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if not self._writing(path):
                super()._answer(self._body())

    def _writing(self, path: str) -> bool:
        """Answer what models and accounts are asked; False: it is not about them."""
        server = self.server
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        account = server.accounts.get(token)
        if path == "/api/whoami-v2":
            self._json(account.answer()) if account else self._send(401, b'{"error":"Invalid token"}')
        elif path == "/api/repos/create":
            self._create(json.loads(self._body()), account)
        elif path == "/api/validate-yaml":
            self._body()
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/_lfs/([0-9a-f]{64})", path):
            data = self._body()
            if hashlib.sha256(data).hexdigest() != match.group(1):
                self._send(400, b'{"error":"sha256 mismatch"}')
                return True
            with server.writing:
                server.blobs[match.group(1)] = data
                server.put_bytes += len(data)
            self._send(200)
        elif match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            self._lfs_batch(json.loads(self._body()))
        elif match := re.fullmatch(
            r"/api/models/([^/]+(?:/[^/]+)?)(?:/(revision|preupload|commit|tree|branch)/([^/]+)/?(.*))?", path
        ):
            return self._model(match, account)
        elif match := re.fullmatch(r"/((?!datasets/|api/)[^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups(), account)
        else:
            return False
        return True

    def _create(self, asked: dict[str, Any], account: Account | None) -> None:
        if account is None or account.role == "read":
            self._send(403 if account else 401, b'{"error":"no"}')
            return
        repo = f"{asked.get('organization') or account.name}/{asked['name']}"
        answer = json.dumps({"url": f"{self.server.url}/{repo}", "name": repo, "id": "0" * 24}).encode()
        with self.server.writing:
            there = repo in self.server.models
            if not there:
                self.server.models[repo] = Repo(asked.get("visibility") == "private")
        self._send(409 if there else 200, answer, {"Content-Type": "application/json"})

    def _repo(self, name: str, account: Account | None) -> Repo | None:
        repo = self.server.models.get(name)
        if repo is None or (repo.private and account is None):
            self._missing("RepoNotFound", 401 if account is None else 404)
            return None
        return repo

    def _model(self, match: re.Match[str], account: Account | None) -> bool:
        name, what, revision, rest = match.groups()
        body = self._body()
        repo = self._repo(name, account)
        if repo is None:
            return True
        if what == "branch":
            there = repo.heads.setdefault(revision, repo.heads["main"]) != repo.heads["main"]
            self._send(409 if there else 200)
            return True
        commit = repo.at(revision or "main")
        if commit is None:
            self._missing("RevisionNotFound")
            return True
        files = repo.trees[commit]
        if what in (None, "revision"):
            self._json({"id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": [], "downloads": 0,
                        "likes": 0, "siblings": [{"rfilename": each} for each in sorted(files)]})  # fmt: skip
        elif what == "preupload":
            self._json({"files": [self._mode(repo, files, each) for each in json.loads(body)["files"]]})
        elif what == "commit":
            self._commit(name, repo, revision, body, account)
        else:
            self._tree_of(files, repo, rest)
        return True

    def _mode(self, repo: Repo, files: dict[str, bytes], asked: dict[str, Any]) -> dict[str, Any]:
        large = asked["size"] > self.server.lfs_bytes or b"\0" in base64.b64decode(asked["sample"])
        answer = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if asked["path"] in files:
            data = files[asked["path"]]
            answer["oid"] = hashlib.sha256(data).hexdigest() if large else git_oid(data)
        return answer

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            entry: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/_lfs/{each['oid']}", "header": {}}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, branch: str, body: bytes, account: Account | None) -> None:
        if account is None or account.role == "read":
            self._send(403, b'{"error":"no"}')
            return
        with self.server.writing:
            files, title = dict(repo.trees[repo.heads[branch]]), ""
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    title = value["summary"]
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"], None)
            oid = repo.commit(title, files, branch)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def _tree_of(self, files: dict[str, bytes], repo: Repo, under: str) -> None:
        found = [{"type": "file", "oid": git_oid(data), "size": len(data), "path": each}
                 for each, data in sorted(files.items()) if each.startswith(under)]  # fmt: skip
        self._json(found)

    def _resolve(self, name: str, revision: str, path: str, account: Account | None) -> None:
        repo = self._repo(name, account)
        if repo is None:
            return
        commit = repo.at(revision)
        if commit is None:
            self._missing("RevisionNotFound")
            return
        headers = {"X-Repo-Commit": commit}
        data = repo.trees[commit].get(path)
        if data is None:
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "not there"})
            return
        if len(data) > self.server.lfs_bytes:
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "ETag": f'"{digest}"'}
        else:
            headers["ETag"] = f'"{git_oid(data)}"'
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match.group(1)), int(match.group(2) or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            self._send(206, data[first : last + 1], headers)
        else:
            self._send(200, data, headers)


if __name__ == "__main__":
    import sys

    with LoopbackModelHub(int(sys.argv[1]) if len(sys.argv) > 1 else 0) as hub:
        variables = " ".join(f"{name}={value}" for name, value in hub.environment().items() if value)
        sys.stdout.write(f"export {variables}\n")
        sys.stdout.flush()
        threading.Event().wait()
