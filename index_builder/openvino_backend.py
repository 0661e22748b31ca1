"""The encoder's network in OpenVINO, which computes faster than torch on CPUs. The only importer of openvino.

Dimensions: B texts of a batch, T tokens of each, X width of a vector.
"""

import importlib
import sys
import threading
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retro.errors import ConfigError, DependencyError
from retro.generate import Role

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""OpenVINO's names of the types in which it computes on a CPU."""
MAX_DISTANCE = 0.1
"""From the vectors of torch, by their length, that a converted model may be. bfloat16 leaves some hundredths in random networks."""


class Network:
    """A sentence-transformers model from tokens to vectors, compiled for this CPU and as many threads as torch has.

    Shapes stay dynamic, and a vector depends neither on the texts beside it nor on the numbers of texts and threads: every row of
    a product is computed alike, which the tests hold for all shapes that occur.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        dtype: str,
        *,
        names: tuple[str, ...],
        rest: dict[str, Any],
        role: Role,
        sample: list[int],
    ) -> None:
        """Converts and compiles; seconds for a small model.

        Args:
            model: In float32, on a CPU.
            name: For messages.
            dtype: A key of PRECISIONS.
            names: Which of input_ids, attention_mask and token_type_ids the model takes.
            rest: What else it is given, the same for all texts.
            role: Of the texts.
            sample: Tokens of some text, to try the model with.

        Raises:
            ConfigError: The model cannot be converted, or this CPU has no bfloat16.
            DependencyError: openvino is not installed.
        """
        openvino = _import_openvino()

        def compute(ids_BT: torch.Tensor) -> Any:
            # Texts of one length: nothing is padded.
            arrays = (ids_BT, torch.ones_like(ids_BT), torch.zeros_like(ids_BT))
            given = dict(zip(("input_ids", "attention_mask", "token_type_ids"), arrays, strict=True))
            features = {key: given[key] for key in names} | rest
            return model(features, task=role)["sentence_embedding"]

        limit = min(model.max_seq_length or 128, 128)
        example_BT = torch.from_numpy(np.resize(sample, (2, min(66, limit))))
        try:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")  # what tracing may get wrong shows below
                traced = torch.jit.trace(compute, (example_BT,), check_trace=False)  # type: ignore[no-untyped-call]
                converted = openvino.convert_model(traced, example_input=(example_BT,))
            settings = {
                "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,  # else processes on one machine would all take its first cores
            }
            compiled = openvino.Core().compile_model(converted, "CPU", settings)
            self._request = compiled.create_infer_request()
            self._lock = threading.Lock()
            # Tracing follows one path through the code, with one shape: others tell whether it is the only one.
            for shape in ((3, min(17, limit)), (1, limit)):
                ids_BT = torch.from_numpy(np.resize(sample, shape))
                with torch.inference_mode():
                    want_BX = compute(ids_BT).numpy()
                distances_B = np.linalg.norm(self(ids_BT.numpy()) - want_BX, axis=1)
                if not (distances_B <= MAX_DISTANCE * np.linalg.norm(want_BX, axis=1)).all():
                    raise ValueError("its vectors become other ones")
        except Exception as error:  # the libraries raise nearly everything
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ConfigError(
                f"the encoder {name!r} cannot be converted for OpenVINO: {reason}. Use --backend torch"
            ) from error
        computed = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if computed != PRECISIONS[dtype]:
            raise ConfigError(
                f"dtype = {dtype}: OpenVINO computes in {computed} on this CPU; use --dtype float32 or --backend torch"
            )

    def __call__(self, ids_BT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors [B, X] of B texts of T tokens each."""
        with self._lock:
            # A copy: the next call writes to the same place.
            return np.array(self._request.infer([ids_BT])[0], np.float32)


def _import_openvino() -> Any:
    # As soon as it is imported it would report its use to its makers; without this package of its own it cannot.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise DependencyError("the backend openvino takes the package openvino: install retro-lm[openvino]") from error
