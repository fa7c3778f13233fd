"""Tests the proxy with the official OpenAI client, which has a client token of the proxy and nothing else.

    OPENAI_API_KEY=TOKEN python openai.py PROXY LIMITED REVOKED MISSING SPEECH

The first four arguments are base URLs of proxies: with a valid key, with the key of a limited account, with a revoked key, and
for an API that once answers that the key is missing. SPEECH is a file with the expected audio.
"""

import os
import sys

# Otherwise `import openai` would import this file.
sys.path.pop(0)

import openai  # noqa: E402
from openai import OpenAI  # noqa: E402

good, limited, revoked, missing, speech = sys.argv[1:]
token = os.environ["OPENAI_API_KEY"]
HELLO = [{"role": "user", "content": "one two three"}]
REPLY = "Selam! You said: one two three"


def client(base_url, **options):
    return OpenAI(base_url=base_url, max_retries=0, timeout=60, **options)


def chat(with_client, **options):
    return with_client.chat.completions.create(model="selam-turbo", messages=HELLO, **options)


def refused(kind, status, code, call):
    """Asserts that the call fails with exactly this exception."""
    try:
        call()
    except openai.APIStatusError as error:
        assert type(error) is kind, repr(error)
        assert error.status_code == status, error.status_code
        assert error.code == code, error.code
        assert error.body["message"], error.body
        print(f"{kind.__name__}: {error}")
    else:
        raise AssertionError(f"no {kind.__name__}")


selam = client(good)

completion = chat(selam)
assert completion.choices[0].message.content == REPLY, completion
assert completion.model == "selam-turbo", completion
print("a chat completion")

with chat(selam, stream=True) as stream:
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
assert "".join(pieces) == REPLY, pieces
assert len(pieces) > 3, pieces
print("a stream")

audio = selam.audio.speech.create(model="selam-tts", voice="alloy", input="Selam")
with open(speech, "rb") as expected:
    assert audio.content == expected.read()
assert audio.content.startswith(b"RIFF")
print("an audio file")

with selam.audio.speech.with_streaming_response.create(model="selam-tts", voice="alloy", input="Selam") as streamed:
    assert b"".join(streamed.iter_bytes()) == audio.content
print("an audio file, streamed")

# The three errors that SelamAPI documents, from the API ...
refused(openai.AuthenticationError, 401, "invalid_api_key", lambda: chat(client(revoked)))
refused(openai.AuthenticationError, 401, "invalid_api_key", lambda: chat(client(revoked), stream=True))
refused(openai.AuthenticationError, 401, "missing_api_key", lambda: chat(client(missing)))
refused(
    openai.PermissionDeniedError,
    403,
    "insufficient_permissions",
    lambda: client(limited).audio.speech.create(model="selam-tts", voice="alloy", input="Selam"),
)
# ... and from the proxy, in the same shape.
refused(openai.AuthenticationError, 401, "invalid_api_key", lambda: chat(client(good, api_key=token + "x")))
nobody = client(good, default_headers={"Authorization": ""})
refused(openai.AuthenticationError, 401, "missing_api_key", lambda: chat(nobody))

# A limited key still allows chat.
assert chat(client(limited)).choices[0].message.content == REPLY

print("all is well")
