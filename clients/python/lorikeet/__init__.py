"""Client of a Lorikeet server, over gRPC.

    from lorikeet import Client

    with Client("localhost:50051") as client:
        print(client.generate("What is the weather like?", adapter="pirate").text)
        for piece in client.stream([("user", "Hi")], adapter="sql", max_tokens=64):
            print(piece.text, end="")
        client.adapters.load("sql", "/adapters/sql")

`lorikeet.aio.Client` is the same for asyncio. Calls fail with LorikeetError, whose `code` is a
grpc.StatusCode and whose message names the field, the value and the bound.
"""

from lorikeet._common import Answer, LorikeetError, Piece
from lorikeet._requests import Prompt
from lorikeet._sync import Client

__all__ = ["Answer", "Client", "LorikeetError", "Piece", "Prompt"]
