"""OpenAI's own Python client against a running server: sync, async, streams, errors, retries.

usage: openai_client.py BASE_URL API_KEY
"""

import asyncio
import sys

import openai

url, key = sys.argv[1:3]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
PROMPT = "def fibonacci(n):"


def expect(error, call, **fields):
    try:
        call()
    except error as e:
        for name, value in fields.items():
            assert getattr(e, name) == value, (name, getattr(e, name), e)
        return e
    raise AssertionError(f"no {error.__name__}")


# Models.
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
expect(openai.NotFoundError, lambda: client.models.retrieve("nothing"), code="model_not_found")

# Completions, whole and streamed.
whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=0, logprobs=2)
choice = whole.choices[0]
assert choice.finish_reason == "length" and whole.usage.completion_tokens == 16
assert len(choice.logprobs.token_logprobs) == 16 and "".join(choice.logprobs.tokens) == choice.text
stream = client.completions.create(
    model=model, prompt=PROMPT, max_tokens=16, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
assert "".join(c.choices[0].text for c in chunks if c.choices) == choice.text
assert chunks[-1].usage.total_tokens == whole.usage.total_tokens

# Chats, whole and streamed; choices; seeds; log-probabilities.
messages = [{"role": "user", "content": "def add(a, b):"}]
chat = client.chat.completions.create(
    model=model, messages=messages, max_completion_tokens=12, n=2, seed=5, logprobs=True, top_logprobs=3
)
assert len(chat.choices) == 2 and chat.choices[0].message.role == "assistant"
assert all(len(t.top_logprobs) == 3 for t in chat.choices[0].logprobs.content)
again = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=12, seed=5)
assert again.choices[0].message.content == chat.choices[0].message.content
# The client's own assembly of a stream; it understands that the length ended it.
with client.chat.completions.stream(model=model, messages=messages, max_completion_tokens=12, seed=5) as events:
    e = expect(openai.LengthFinishReasonError, lambda: [None for _ in events] and events.get_final_completion())
assert e.completion.choices[0].message.content == again.choices[0].message.content

# A stream that is closed early.
with client.completions.create(model=model, prompt="x", max_tokens=1000, stream=True) as endless:
    for _, _ in zip(endless, range(3)):
        pass

# Errors are the client's types.
e = expect(openai.BadRequestError, lambda: client.completions.create(model=model, prompt=PROMPT, max_tokens=10**6))
assert e.code == "context_length_exceeded", e.code
expect(openai.BadRequestError, lambda: client.completions.create(model=model, prompt=PROMPT, temperature=-1))
expect(openai.NotFoundError, lambda: client.completions.create(model="nothing", prompt=PROMPT))
wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
expect(openai.AuthenticationError, lambda: wrong.models.list(), status_code=401)


async def many():
    """More at once than the queue holds: refusals are rate-limit errors, and the client's retries get through."""
    impatient = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    patient = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=500)

    async def one(c):
        answer = await c.completions.create(model=model, prompt=PROMPT, max_tokens=200, extra_body={"ignore_eos": True})
        return answer.usage.completion_tokens

    outcomes = await asyncio.gather(*(one(impatient) for _ in range(60)), return_exceptions=True)
    refused = [o for o in outcomes if isinstance(o, openai.RateLimitError)]
    assert len(refused) + outcomes.count(200) == 60 and refused, outcomes
    assert all(r.response.headers["retry-after"] == "1" for r in refused)
    outcomes = await asyncio.gather(*(one(patient) for _ in range(24)))
    assert outcomes == [200] * 24

    text = ""
    async for chunk in await patient.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=12, seed=5, stream=True
    ):
        text += chunk.choices[0].delta.content or ""
    assert text == again.choices[0].message.content


asyncio.run(many())
print("openai client: all as it should be")
