"""Makes the messages of lorikeet.v1 from the server's own protos while the package is built."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = pathlib.Path(__file__).parent


def protos() -> pathlib.Path:
    """In a source archive, or in the server's source tree."""
    own = HERE / "proto"
    return own if own.is_dir() else HERE.parents[1] / "proto"


class BuildWithProtos(build_py):
    def run(self) -> None:
        from grpc_tools import protoc

        target = str(HERE) if self.editable_mode else self.build_lib
        pathlib.Path(target).mkdir(parents=True, exist_ok=True)
        folder = protos()
        files = [str(path) for path in sorted(folder.glob("lorikeet/v1/*.proto"))]
        command = ["protoc", f"-I{folder}", f"--python_out={target}", f"--pyi_out={target}",
                   f"--grpc_python_out={target}", *files]
        if not files or protoc.main(command) != 0:
            raise RuntimeError(f"no messages could be made from {folder}")
        super().run()


class SdistWithProtos(sdist):
    def make_release_tree(self, base_dir: str, files: list) -> None:
        super().make_release_tree(base_dir, files)
        shutil.copytree(protos(), pathlib.Path(base_dir) / "proto", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithProtos, "sdist": SdistWithProtos})
