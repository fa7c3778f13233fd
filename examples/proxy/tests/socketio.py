"""Talks to the voice agent through the proxy, with the Socket.IO client for Python.

    CLIENT_TOKEN=TOKEN python socketio.py PROXY TRANSPORTS NAMESPACE

Prints `all is well` if events, attachments and acknowledgements come back, or the error with which the connection fails.
"""

import os
import sys
import threading

# Otherwise `import socketio` would import this file.
sys.path.pop(0)

import socketio  # noqa: E402

proxy, transports, namespace = sys.argv[1:]
token = os.environ["CLIENT_TOKEN"]

client = socketio.Client(reconnection=False)
arrived = {"text": threading.Event(), "audio": threading.Event()}
echoes = {}


@client.on("*", namespace=namespace)
def echo(event, *values):
    echoes[event] = values
    arrived[event].set()


def received(event):
    assert arrived[event].wait(30), f"no {event}"
    return echoes[event]


try:
    client.connect(
        f"{proxy}?voice=mekdes&token={token}",
        transports=transports.split(","),
        namespaces=[namespace],
        wait_timeout=10,
    )
except socketio.exceptions.ConnectionError as error:
    print(f"ConnectionError: {error}")
    sys.exit()

audio = bytes(range(256)) * 400
client.emit("text", ("ሰላም", {"n": 1}), namespace=namespace)
client.emit("audio", (audio, "and text"), namespace=namespace)
assert received("text") == ("ሰላም", {"n": 1}), echoes
assert received("audio") == (audio, "and text"), "the audio differs"
acknowledged = client.call("text", {"a": [audio]}, namespace=namespace, timeout=30)
assert acknowledged == {"a": [audio]}, "the acknowledgement differs"
print(client.transport())
client.disconnect()
print("all is well")
