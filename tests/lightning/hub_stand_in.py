"""A stand-in for the Hugging Face Hub on this machine: of its HTTP interface what its client uses."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_tests"


class Hub:
    """Repositories as lists of commits, each of which is a dict of files, {name: content}.

    A repository whose name ends in "-gated" or "-private" answers as the hub does to who may not read it.
    """

    def __init__(self):
        self.repositories, self.private, self.requests = {}, {}, []
        self.sizes = {}  # that a file is said to have
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.requests.append(f"{self.command} {self.path}")
                if not self.path.startswith("/api/"):
                    return self.file()
                return self.answer(404, {"error": "not of this stand-in"})

            do_HEAD = do_GET  # noqa: N815 - as http.server calls it

            def file(self):
                repository, revision, name = re.match(
                    r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path
                ).groups()
                commits = hub.repositories.get(repository)
                if repository.endswith("-gated"):
                    return self.answer(403, {"error": "restricted"}, code="GatedRepo")
                if commits is None or repository.endswith("-private"):
                    return self.answer(401, {"error": "Repository not found"}, code="RepoNotFound")
                known = {"main": len(commits)} | {sha(commits[:n]): n for n in range(1, len(commits) + 1)}
                if revision not in known:
                    return self.answer(404, {"error": "Revision not found"}, code="RevisionNotFound")
                files, commit = commits[known[revision] - 1], sha(commits[: known[revision]])
                if name not in files:
                    return self.answer(404, {"error": "Entry not found"}, code="EntryNotFound")
                etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
                return self.answer(
                    200, files[name], size=hub.sizes.get(name), **{"X-Repo-Commit": commit, "ETag": etag}
                )

            def do_POST(self):
                hub.requests.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid username or password."})
                if self.path == "/api/validate-yaml":  # a README's front matter
                    return self.answer(200, {"errors": [], "warnings": []})
                if self.path == "/api/repos/create":
                    asked = json.loads(body)
                    repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
                    url = f"{hub.url}/{repository}"
                    if repository in hub.repositories:
                        return self.answer(409, {"error": "You already created this model repo", "url": url})
                    hub.repositories[repository] = []
                    # Versions of the client say it in two ways.
                    hub.private[repository] = asked.get("private", asked.get("visibility") == "private")
                    return self.answer(200, {"url": url})
                repository, action = re.match(
                    r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path
                ).groups()
                if action == "preupload":
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
                    return self.answer(200, {"files": modes})
                lines = [json.loads(line)["value"] for line in body.splitlines() if b'"file"' in line]
                files = {line["path"]: base64.b64decode(line["content"]) for line in lines}
                commits = hub.repositories[repository]
                commits.append({**(commits[-1] if commits else {}), **files})
                commit = sha(commits)
                url = f"{hub.url}/{repository}/commit/{commit}"
                return self.answer(200, {"success": True, "commitUrl": url, "commitOid": commit})

            def answer(self, status, content, code=None, size=None, **headers):
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(size or len(raw)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(raw)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def sha(commits):
    """A commit's name, as long as git's."""
    return hashlib.sha1(repr((len(commits), commits[-1:])).encode()).hexdigest()
