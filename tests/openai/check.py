"""Drives a cluster with OpenAI's own client and prints what it saw as one JSON object.

usage: check.py BASE_URL all PROMPT          models, completions and chat, streamed and not
       check.py BASE_URL interrupted PROMPT  streams until the stream fails; says "streaming" on
                                             standard error once it runs
"""

import json
import sys

import openai

SEED = 7
MAX_TOKENS = 24


def completions(client, model, prompt):
    request = dict(model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0.8, seed=SEED)
    whole = client.completions.create(**request)
    chunks = list(
        client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    return {
        "text": whole.choices[0].text,
        "finish_reason": whole.choices[0].finish_reason,
        "usage": whole.usage.model_dump(),
        "streamed_text": "".join(c.choices[0].text for c in chunks if c.choices),
        "streamed_finish_reason": [c.choices[0].finish_reason for c in chunks if c.choices][-1],
        "streamed_usage": chunks[-1].usage.model_dump(),
        "chunks": len(chunks),
    }


def chat(client, model, prompt):
    request = dict(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_completion_tokens=MAX_TOKENS,
        temperature=0,
        seed=SEED,
    )
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    with_logprobs = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    return {
        "text": whole.choices[0].message.content,
        "role": whole.choices[0].message.role,
        "usage": whole.usage.model_dump(),
        "streamed_text": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        "logprobs": len(with_logprobs.choices[0].logprobs.content),
        "top_logprobs": len(with_logprobs.choices[0].logprobs.content[0].top_logprobs),
    }


def errors(client, model, prompt):
    """What bad requests raise: the class, the status and the code."""
    cases = {
        "unknown model": lambda: client.completions.create(model="no-such", prompt=prompt),
        "too long": lambda: client.completions.create(
            model=model, prompt=prompt, max_tokens=10_000_000
        ),
        "bad temperature": lambda: client.completions.create(
            model=model, prompt=prompt, temperature=-1
        ),
        "tools": lambda: client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        ),
    }
    seen = {}
    for name, call in cases.items():
        try:
            call()
            seen[name] = "no error"
        except openai.APIStatusError as error:
            seen[name] = {
                "class": type(error).__name__,
                "status": error.status_code,
                "code": error.code,
                "type": error.type,
            }
    return seen


def everything(client, prompt):
    models = list(client.models.list())
    model = models[0].id
    return {
        "models": [m.id for m in models],
        "retrieved": client.models.retrieve(model).id,
        "completions": completions(client, model, prompt),
        "chat": chat(client, model, prompt),
        "errors": errors(client, model, prompt),
    }


def interrupted(client, prompt):
    model = client.models.list().data[0].id
    pieces = []
    try:
        stream = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=480,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            pieces.append(chunk.choices[0].text)
            if len(pieces) == 1:
                print("streaming", file=sys.stderr, flush=True)
    except openai.APIError as error:
        return {"error": str(error), "class": type(error).__name__, "pieces": len(pieces)}
    return {"error": None, "pieces": len(pieces)}


def main():
    base_url, mode, prompt = sys.argv[1:]
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60)
    run = {"all": everything, "interrupted": interrupted}[mode]
    print(json.dumps(run(client, prompt)))


if __name__ == "__main__":
    main()
