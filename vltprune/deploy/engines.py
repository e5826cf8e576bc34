"""Engines: write an exported program to a file of one format, and run that file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .onnx_operators import operators, simplify

_MOST = 1_900_000_000  # bytes of weights in one ONNX file, which protobuf limits to 2 GiB


class Engine(ABC):
    """Base class: a file format, and the library that runs it.

    Attributes:
        suffix: of the file.
        packages: what must be installed to write and to run it, as Python imports them.
        runtime: the library that runs the file, for readers.
    """

    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    runtime: ClassVar[str]

    @abstractmethod
    def write(self, program: ExportedProgram, file: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Writes a program.

        Args:
            program: the program, of positional tensors.
            file: the file; further ones go beside it, with names that begin alike.
            inputs: names of the inputs, in order.
            outputs: names of the outputs, in order.
        """

    @abstractmethod
    def run(self, file: Path, batches: Sequence[Mapping[str, Tensor]]) -> list[list[Tensor]]:
        """Loads a file, and runs it on the CPU.

        Args:
            file: the file.
            batches: inputs by name, for one run each.

        Returns:
            The outputs of each run, in order.
        """

    def check_installed(self) -> None:
        """ImportError for a package that is missing, with what to install."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"{self.suffix} needs {', '.join(missing)}: pip install 'vltprune[export]'")


class Onnx(Engine):
    """ONNX, run by ONNX Runtime."""

    suffix, packages, runtime = ".onnx", ("onnx", "onnxscript", "onnxruntime"), "ONNX Runtime"

    def write(self, program: ExportedProgram, file: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        size = sum(one.numel() * one.element_size() for one in program.state_dict.values())
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # of the exporter about itself, as what it logs
            written: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=[*inputs],
                output_names=[*outputs],
                custom_translation_table=operators(),
                optimize=False,
                verbose=False,
            )
            simplify(written.model)
            written.save(file, external_data=size > _MOST)

    def run(self, file: Path, batches: Sequence[Mapping[str, Tensor]]) -> list[list[Tensor]]:
        onnxruntime: Any = importlib.import_module("onnxruntime")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        known = {one.name for one in session.get_inputs()}  # an input that the graph does not read is none of it
        arrays = ({name: one.numpy() for name, one in batch.items() if name in known} for batch in batches)
        return [[torch.from_numpy(one) for one in session.run(None, batch)] for batch in arrays]


class OpenVino(Engine):
    """OpenVINO's .xml, with weights in a .bin beside it, converted from ONNX."""

    suffix, packages, runtime = ".xml", ("openvino", *Onnx.packages[:2]), "OpenVINO"

    def write(self, program: ExportedProgram, file: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        openvino: Any = importlib.import_module("openvino")
        between = file.with_suffix(Onnx.suffix)
        Onnx().write(program, between, inputs, outputs)
        model = openvino.convert_model(str(between))
        for node in model.get_ops():
            if node.get_type_name() == "TopK":
                node.set_attribute("stable", True)  # equal scores go by position, in ONNX by definition
        openvino.save_model(model, str(file), compress_to_fp16=False)
        for one in file.parent.glob(f"{between.name}*"):
            one.unlink()

    def run(self, file: Path, batches: Sequence[Mapping[str, Tensor]]) -> list[list[Tensor]]:
        openvino: Any = importlib.import_module("openvino")
        # by itself OpenVINO computes in bfloat16 where the CPU can
        compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        known = {name for one in compiled.inputs for name in one.get_names()}
        results = (compiled({n: one.numpy() for n, one in batch.items() if n in known}) for batch in batches)
        return [[torch.from_numpy(one.copy()) for one in result.values()] for result in results]


class Pt2(Engine):
    """torch.export's own file, run by PyTorch without this package."""

    suffix, packages, runtime = ".pt2", (), "torch.export.load"

    def write(self, program: ExportedProgram, file: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        torch.export.save(program, file)

    def run(self, file: Path, batches: Sequence[Mapping[str, Tensor]]) -> list[list[Tensor]]:
        module = torch.export.load(file).module()
        with torch.no_grad():
            return [[*module(*batch.values())] for batch in batches]


ENGINES: dict[str, Engine] = {"onnx": Onnx(), "openvino": OpenVino(), "pt2": Pt2()}


def find_format(path: str | Path, format: str | None) -> str:
    """The name of the format of a file.

    Args:
        path: the file.
        format: "onnx", "openvino" or "pt2". None for that of the path's suffix.

    Returns:
        The format's name.

    Raises:
        ValueError: for an unknown format or suffix, and for a suffix of another format.
    """
    known = ", ".join(f"{name} ({engine.suffix})" for name, engine in ENGINES.items())
    if format is not None and format not in ENGINES:
        raise ValueError(f"format={format!r} is none: write one of {known}")
    suffix = Path(path).suffix.lower()
    of_suffix = next((name for name, engine in ENGINES.items() if engine.suffix == suffix), None)
    if of_suffix is None or (format is not None and format != of_suffix):
        wanted = known if format is None else f"{Path(path).stem}{ENGINES[format].suffix}"
        raise ValueError(f"{path}: the suffix {suffix!r} is not that of a format: write {wanted}")
    return of_suffix
