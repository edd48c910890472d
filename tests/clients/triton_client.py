"""tritonclient.grpc against a running server: HOST:PORT MODEL, with adapter `pirate`."""

import queue
import sys

import numpy
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

PROMPT = "What is the weather like in spring?"
PARAMETERS = {"max_tokens": 12, "temperature": 0.0}


def text_input(text):
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(numpy.array([text.encode()], dtype=object))
    return [tensor]


def answer(result):
    return result.as_numpy("text_output")[0].decode()


def main():
    url, model = sys.argv[1:]
    client = triton.InferenceServerClient(url)
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(model) and not client.is_model_ready("nobody")
    names = [entry.name for entry in client.get_model_repository_index().models]
    assert names == [model, "pirate"], names
    assert client.get_model_metadata("pirate").versions

    wanted = {name: answer(client.infer(name, text_input(PROMPT), parameters=PARAMETERS))
              for name in (model, "pirate")}
    assert wanted[model] != wanted["pirate"]

    arrived = queue.Queue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    for name in wanted:
        client.async_stream_infer(name, text_input(PROMPT), request_id=name, parameters=PARAMETERS)
    texts, left = dict.fromkeys(wanted, ""), len(wanted)
    while left:
        result, error = arrived.get(timeout=60)
        assert error is None, error
        response = result.get_response()
        texts[response.id] += answer(result)
        left -= response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    assert texts == wanted, (texts, wanted)

    try:
        client.infer("nobody", text_input(PROMPT))
        raise AssertionError("not refused")
    except InferenceServerException as error:
        assert error.status() == "StatusCode.NOT_FOUND", error
    client.unload_model("pirate")
    assert not client.is_model_ready("pirate")
    client.load_model("pirate")  # the directory of that name below the adapter root
    assert client.is_model_ready("pirate")
    assert answer(client.infer("pirate", text_input(PROMPT), parameters=PARAMETERS)) == \
        wanted["pirate"]
    print("tritonclient: everything as it should be")


main()
