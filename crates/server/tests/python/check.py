"""The real OpenAI client against a server with the tiny model. Arguments: base URL, key."""

import concurrent.futures
import json
import sys

import openai

BASE, KEY = sys.argv[1:3]
client = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0)
ASCII = {"allowed_token_ids": list(range(3 + 32, 3 + 127))}


def completions():
    answer = client.completions.create(
        model="tiny-llama", prompt="hello", max_tokens=10, seed=1, logprobs=2, extra_body=ASCII
    )
    choice = answer.choices[0]
    assert len(choice.text) == 10 and choice.finish_reason == "length", choice
    assert len(choice.logprobs.token_logprobs) == 10 == len(choice.logprobs.top_logprobs)
    assert answer.usage.completion_tokens == 10 and answer.system_fingerprint

    many = client.completions.create(
        model="tiny-llama", prompt=[f"prompt {i}" for i in range(32)], max_tokens=4, seed=1
    )
    assert [choice.index for choice in many.choices] == list(range(32))

    parts = client.completions.create(
        model="tiny-llama", prompt="hello", max_tokens=10, seed=1, stream=True,
        stream_options={"include_usage": True}, extra_body=ASCII,
    )
    parts = list(parts)
    assert "".join(part.choices[0].text for part in parts if part.choices) == choice.text
    assert parts[-1].usage.completion_tokens == 10 and not parts[-1].choices

    scored = client.completions.create(
        model="tiny-llama", prompt="hello", max_tokens=0, echo=True, logprobs=0
    ).choices[0]
    assert scored.text == "hello" and scored.logprobs.token_logprobs[0] is None
    assert all(p < 0 for p in scored.logprobs.token_logprobs[1:])


def chat():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    asked = dict(model="tiny-llama", messages=messages, max_completion_tokens=8, seed=3, extra_body=ASCII)
    answer = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=3)
    assert len(answer.choices) == 2 and answer.choices[0].message.role == "assistant"
    content = answer.choices[0].logprobs.content
    assert len(content) == 8 and len(content[0].top_logprobs) == 3
    assert bytes(content[0].bytes).decode() == content[0].token
    text = ""
    for part in client.chat.completions.create(**asked, stream=True):
        text += part.choices[0].delta.content or ""
    assert text == answer.choices[0].message.content


def structured_and_tools():
    messages = [{"role": "user", "content": "q"}]
    asked = dict(model="tiny-llama", messages=messages, max_completion_tokens=400, seed=5)
    schema = {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["n"], "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**asked, response_format=form).choices[0]
    assert answer.finish_reason == "stop" and 1 <= json.loads(answer.message.content)["n"] <= 9, answer

    city = {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Bern"]}}, "required": ["city"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": city}}]
    asked |= dict(tools=tools, tool_choice="required", parallel_tool_calls=False)
    answer = client.chat.completions.create(**asked).choices[0]
    call = answer.message.tool_calls[0]
    assert answer.finish_reason == "tool_calls" and call.function.name == "weather", answer
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Bern")
    arguments, name = "", None
    for part in client.chat.completions.create(**asked, stream=True):
        for piece in part.choices[0].delta.tool_calls or []:
            name = name or piece.function.name
            arguments += piece.function.arguments or ""
    assert (name, arguments) == ("weather", call.function.arguments)


def responses():
    asked = dict(model="tiny-llama", input="q", instructions="i", max_output_tokens=6, temperature=0)
    answer = client.responses.create(**asked)
    assert answer.status == "incomplete" and answer.usage.output_tokens == 6
    kinds, text = [], ""
    for event in client.responses.create(**asked, stream=True):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete", kinds
    assert text == answer.output_text


def responses_with_tools():
    city = {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Bern"]}}, "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "name": "weather", "description": "d", "parameters": city, "strict": True}
    asked = dict(
        model="tiny-llama", tools=[tool], tool_choice={"type": "function", "name": "weather"},
        max_output_tokens=400, temperature=1.0, extra_body={"seed": 5},
    )
    answer = client.responses.create(input="q", **asked)
    (call,) = answer.output
    assert answer.status == "completed" and answer.output_text == "", answer
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed"), call
    assert json.loads(call.arguments)["city"] in ("Paris", "Bern")
    assert answer.tools[0].name == "weather" and answer.tool_choice.name == "weather"

    # Event by event, and as the client's own helper adds them up.
    events = list(client.responses.create(input="q", stream=True, **asked))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if not event.type.endswith("arguments.delta")]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ], kinds
    deltas = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    done = events[-2].item
    assert deltas == done.arguments == call.arguments
    assert events[-1].response.output == [done]
    with client.responses.stream(input="q", **asked) as stream:
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                assert call.arguments.startswith(event.snapshot), event
        final = stream.get_final_response()
    assert final.output[0].parsed_arguments == json.loads(call.arguments)

    # The second turn: what came goes back as it is.
    turn = [{"role": "user", "content": "q"}, *answer.output]
    turn.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    asked |= dict(tool_choice="auto", max_output_tokens=6)
    told = client.responses.create(input=turn, **asked)
    assert told.usage.output_tokens == 6 and told.usage.input_tokens > answer.usage.input_tokens
    kinds = [event.type for event in client.responses.create(input=turn, stream=True, **asked)]
    assert kinds[-1] == "response.incomplete", kinds
    try:
        client.responses.create(input="q", model="tiny-llama", tools=[{"type": "web_search"}])
        raise AssertionError("a tool that there is not was taken")
    except openai.BadRequestError as error:
        assert error.param == "tools[0].type", error.body


def models_and_errors():
    model = client.models.list().data[0]
    assert model.id == "tiny-llama" and client.models.retrieve("tiny-llama").id == model.id

    def refused(kind, **asked):
        try:
            client.completions.create(**{"model": "tiny-llama", "prompt": "x", **asked})
        except kind as error:
            return error
        raise AssertionError(f"{asked} was taken")

    error = refused(openai.BadRequestError, temperature=3)
    assert error.param == "temperature" and error.type == "invalid_request_error", error.body
    error = refused(openai.BadRequestError, prompt=list(range(3, 200)) * 100)
    assert error.code == "context_length_exceeded" and "maximum context length is" in error.message
    assert refused(openai.NotFoundError, model="other").code == "model_not_found"
    try:
        openai.OpenAI(base_url=BASE, api_key="wrong").models.list()
        raise AssertionError("a wrong key was taken")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key"


def documented_example():
    """Alone and among 31 neighbours: the same bytes."""

    def ask(prompt):
        raw = client.completions.with_raw_response.create(
            model="tiny-llama", prompt=prompt, max_tokens=24, temperature=0.7, seed=42, logprobs=5
        )
        return json.dumps(json.loads(raw.text)["choices"][0]["logprobs"])

    prompt = "The future of AI is"
    alone = ask(prompt)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        crowd = list(pool.map(ask, [f"{prompt} {'so ' * i}" for i in range(1, 32)] + [prompt]))
    assert crowd[-1] == alone
    assert crowd[0] != alone, "the control: another prompt has other logprobs"


for check in (
    completions, chat, structured_and_tools, responses, responses_with_tools, models_and_errors, documented_example,
):
    check()
    print(f"{check.__name__}: ok")
