"""What a user of tritonclient does. Runs in an environment that has it and nothing of ours, and prints JSON.

python talk.py SCENARIO HOST:PORT
"""

import asyncio
import json
import queue
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.utils.shared_memory as shared
from tritonclient.utils import InferenceServerException


def tensor(values: Any, name: str = "x", module: Any = triton) -> Any:
    array = np.array(values, np.float32)
    made = module.InferInput(name, list(array.shape), "FP32")
    made.set_data_from_numpy(array)
    return made


def numbers(result: Any, name: str = "y") -> Any:
    return result.as_numpy(name).tolist()


def batch(url: str) -> Any:
    client = triton.InferenceServerClient(url)
    wanted = [triton.InferRequestedOutput("y", class_count=1)]
    zipped = client.infer("doubler", [tensor([[1, 2]])], compression_algorithm="gzip")
    classes = client.infer("doubler", [tensor([[1, 2]])], outputs=wanted).as_numpy("y").ravel()
    index = client.get_model_repository_index().models
    return {
        "ready": [client.is_server_ready(), *map(client.is_model_ready, ("doubler", "nobody"))],
        "answer": numbers(client.infer("doubler", [tensor([[1, 2], [3, 4]])], request_id="7")),
        "id": client.infer("doubler", [tensor([[1, 2]])], request_id="7").get_response().id,
        "zipped": numbers(zipped),
        "classes": [one.decode() for one in classes],
        "metadata": client.get_model_metadata("accumulator", as_json=True)["inputs"][0]["shape"],
        "config": client.get_model_config("accumulator", as_json=True)["config"]["max_batch_size"],
        "statistics": int(client.get_inference_statistics("doubler").model_stats[0].inference_count) > 0,
        "index": sorted(one.name for one in index if one.state == "READY"),
    }


def errors(url: str) -> Any:
    client = triton.InferenceServerClient(url)
    told = []
    calls: list[Callable[[], Any]] = [
        lambda: client.infer("nobody", [tensor([[1, 2]])]),
        lambda: client.infer("doubler", [tensor([[1, 2]])], model_version="9"),
        lambda: client.infer("doubler", [tensor([[1, 2, 3]])]),
        lambda: client.infer("doubler", [tensor([[1, 2]], "z")]),
        lambda: client.infer("accumulator", [tensor([[1]])]),
        lambda: client.infer("accumulator", [tensor([[1]])], sequence_id=5),
    ]
    for call in calls:
        try:
            call()
        except InferenceServerException as error:
            told.append([error.status(), error.message()])
    return told


def sequences(url: str) -> Any:
    client = triton.InferenceServerClient(url)

    def step(sequence: Any, value: float, **flags: bool) -> Any:
        answer = client.infer("accumulator", [tensor([[value]])], sequence_id=sequence, **flags)
        return numbers(answer)[0][0]

    first = step(1, 1.0, sequence_start=True), step("one", 10.0, sequence_start=True)
    second = step(1, 2.0), step("one", 20.0)
    last = step(1, 3.0, sequence_end=True), step("one", 30.0, sequence_end=True)
    return [*first, *second, *last]


def stream(url: str) -> Any:
    client = triton.InferenceServerClient(url)
    answers: Any = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for number in range(1, 4):
        for sequence in (7, 8):
            client.async_stream_infer(
                "accumulator",
                [tensor([[number * sequence]])],
                request_id=f"{sequence}-{number}",
                sequence_id=sequence,
                sequence_start=number == 1,
                sequence_end=number == 3,
            )
    client.async_stream_infer("nobody", [tensor([[1]])], request_id="wrong")
    client.async_stream_infer("accumulator", [tensor([[5]])], request_id="anonymous")
    told = []
    for _ in range(8):
        result, error = answers.get(timeout=30)
        told.append(str(error) if error else [result.get_response().id, numbers(result)[0][0]])
    client.stop_stream()
    return told


def asynchronous(url: str) -> Any:
    client = triton.InferenceServerClient(url)
    answers: Any = queue.Queue()
    for number in range(20):
        client.async_infer(
            "doubler", [tensor([[number, 0]])], lambda result, error: answers.put((result, error))
        )
    found = []
    for _ in range(20):
        result, error = answers.get(timeout=30)
        found.append(str(error) if error else numbers(result)[0][0])
    return sorted(found)


def aio(url: str) -> Any:
    async def talk() -> Any:
        async with triton_aio.InferenceServerClient(url) as client:
            unary = await client.infer("doubler", [tensor([[1, 2]], module=triton_aio)])

            async def requests() -> Any:
                for number in range(1, 4):
                    yield {
                        "model_name": "accumulator",
                        "inputs": [tensor([[number]], module=triton_aio)],
                        "sequence_id": 3,
                        "sequence_start": number == 1,
                        "sequence_end": number == 3,
                    }

            totals = [numbers(result)[0][0] async for result, error in client.stream_infer(requests())]
            return [numbers(unary), totals]

    return asyncio.run(talk())


def memory(url: str) -> Any:
    client = triton.InferenceServerClient(url)
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    values = np.array([[1, 2]], np.float32)
    handles = [shared.create_shared_memory_region(name, f"/tenuto-talk-{name}", 8) for name in ("in", "out")]
    try:
        shared.set_shared_memory_region(handles[0], [values])
        for name in ("in", "out"):
            client.register_system_shared_memory(name, f"/tenuto-talk-{name}", 8)
        given = triton.InferInput("x", [1, 2], "FP32")
        given.set_shared_memory("in", 8)
        wanted = triton.InferRequestedOutput("y")
        wanted.set_shared_memory("out", 8)
        client.infer("doubler", [given], outputs=[wanted])
        status = client.get_system_shared_memory_status(as_json=True)
        found = shared.get_contents_as_numpy(handles[1], np.float32, [1, 2]).tolist()
        client.unregister_system_shared_memory("in")
        client.unregister_system_shared_memory("out")
        return [found, sorted(status["regions"])]
    finally:
        for handle in handles:
            shared.destroy_shared_memory_region(handle)


def control(url: str) -> Any:
    client = triton.InferenceServerClient(url)
    client.unload_model("doubler")
    gone = client.is_model_ready("doubler")
    client.load_model("doubler")
    return [gone, client.is_model_ready("doubler")]


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
