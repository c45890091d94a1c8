"""What a checkpoint's name means: paths, the Hub's cache, and a Hub that this file serves on the loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kinora.checkpoints_tools.locate import NotFound, locate
from kinora.runtime import load
from kinora.runtime.errors import CheckpointError

REPO, COMMIT, TAGGED = "Some-One/Small-Model", "a" * 40, "b" * 40
FILES = {"config.json": b'{"a": 1}', "weights/part.safetensors": b"12345678", "README.md": b"# not needed"}
REVISIONS = {"main": COMMIT, COMMIT: COMMIT, "v2": TAGGED, TAGGED: TAGGED}


class Hub(BaseHTTPRequestHandler):
    """One public repository with two revisions, a gated one, and nothing else."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if path[:2] == ["api", "models"]:
            repo, revision = "/".join(path[2:4]), path[5] if len(path) > 5 else "main"
            if repo == "Some-One/Gated":
                self._send(403, {"X-Error-Code": "GatedRepo"}, b"{}", body)
            elif repo != REPO:
                self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
            elif revision not in REVISIONS:
                self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
            elif path[4:5] == ["tree"]:
                found = [{"type": "file", "path": k, "size": len(v), "oid": "0" * 40} for k, v in FILES.items()]
                self._send(200, {}, json.dumps(found).encode(), body)
            else:
                siblings = [{"rfilename": name} for name in FILES]
                found = {"id": REPO, "sha": REVISIONS[revision], "siblings": siblings, "private": False, "tags": []}
                self._send(200, {}, json.dumps(found).encode(), body)
            return
        if path[2:3] != ["resolve"]:
            self._send(404, {}, b"", body)  # what the library asks about itself
            return
        revision, name = path[3], "/".join(path[4:])
        content = FILES[name] + revision[:1].encode() * (name == "config.json")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": REVISIONS[revision]}
        self._send(200, headers, content, body)

    def _send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from kinora.checkpoints_tools.locate import NotFound, locate
try:
    print(locate(sys.argv[1], sys.argv[2].split(",") if sys.argv[2] else None, download=sys.argv[3] == "True"))
except NotFound as error:
    print("NotFound:", error)
"""


def ask(name: str, cache: Path, endpoint: str, patterns: str = "", download: bool = True, offline: bool = False) -> str:
    """`locate` in a fresh process, because huggingface_hub reads its environment when it is imported."""
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    surroundings |= {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    surroundings |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, patterns, str(download)], env=surroundings, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_repository_is_downloaded_from_the_endpoint_and_then_found_offline(hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    found = Path(ask(REPO, tmp_path, endpoint, "config.json,weights/*"))
    assert found == tmp_path / "models--Some-One--Small-Model" / "snapshots" / COMMIT
    files = {f.relative_to(found).as_posix() for f in found.rglob("*") if f.is_file()}
    assert files == {"config.json", "weights/part.safetensors"}  # the patterns, and no more
    asked = len(hub.asked)
    assert ask(REPO, tmp_path, endpoint, "config.json,weights/*", offline=True) == str(found)
    assert ask(REPO, tmp_path, endpoint, download=False) == str(found)  # although the README is not there
    assert ask(f"{REPO}@{COMMIT}", tmp_path, endpoint, download=False) == str(found)
    assert len(hub.asked) == asked
    assert locate(found.parents[1]) == found and locate(found) == found


def test_a_revision_is_one_of_its_own(hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    found = Path(ask(f"{REPO}@v2", tmp_path, endpoint, "config.json"))
    assert found.name == TAGGED and (found / "config.json").read_bytes() == FILES["config.json"] + b"b"
    told = ask(f"{REPO}@v3", tmp_path, endpoint)
    assert told.startswith("NotFound:") and f"the repository {REPO} has no revision v3" in told


def test_what_cannot_be_had_is_told_with_the_way_out(hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    assert f"{endpoint} has no repository No/Such" in ask("No/Such", tmp_path, endpoint)
    assert "asks for consent" in ask("Some-One/Gated", tmp_path, endpoint)
    told = ask(REPO, tmp_path, endpoint, offline=True)
    assert "HF_HUB_OFFLINE is set" in told and f"hf download {REPO}" in told and str(tmp_path) in told
    assert "nothing was downloaded" in ask(REPO, tmp_path, endpoint, download=False)
    hub.shutdown()
    hub.server_close()
    told = ask(REPO, tmp_path, endpoint)
    assert told.startswith("NotFound:") and "could not be reached" in told


def test_paths_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Some-One" / "Small-Model").mkdir(parents=True)
    assert locate("Some-One/Small-Model") == Path("Some-One/Small-Model")
    (tmp_path / "file.safetensors").write_bytes(b"")
    assert locate("file.safetensors") == Path("file.safetensors")
    for name in ("nowhere", "./no/where", "/no/where", "a/b/c", "a b/c", "../x/y", "a/b@"):
        with pytest.raises(NotFound, match="there is no file or folder"):
            locate(name)


def test_a_cache_folder_is_its_main_branch(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    for commit in (COMMIT, TAGGED):
        (cache / "snapshots" / commit).mkdir(parents=True)
    with pytest.raises(NotFound, match="2 snapshots, none of the branch main"):
        locate(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(TAGGED)
    assert locate(cache).name == TAGGED


def test_load_tells_what_a_checkpoint_may_be(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"")
    for checkpoint, told in {
        str(tmp_path / "no"): "there is no file or folder",
        "Nobody/Nothing": "HF_HUB_OFFLINE is set",
        str(tmp_path / "file.safetensors"): "is a file; pass the folder of Wan2.2-S2V-14B",
        str(tmp_path): "lacks config.json, diffusion_pytorch_model.safetensors.index.json",
    }.items():
        with pytest.raises(CheckpointError, match=told):
            load("liveavatar-14b", checkpoint=checkpoint, device="cpu")
