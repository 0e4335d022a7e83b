from fst_optimizer.dspy_jobs.matching import Generations, reads_as
from fst_optimizer.engines.base import Generation, GenerationRequest

PROMPT = (1, 2, 3)


def remember(memory, text, ids, *, prompt=PROMPT, version=0, temperature=0.7):
    request = GenerationRequest(prompt, 9, temperature=temperature, version=version)
    memory.add(request, Generation(ids, tuple(-0.5 * token for token in ids), "stop"), text)


def test_a_text_leads_back_to_the_tokens_that_were_sampled():
    memory = Generations(10, 1.0)
    remember(memory, "a b", (7, 8), version=4)
    call = memory.find(PROMPT, "a b")
    assert (call.prompt_ids, call.completion_ids, call.logprobs) == (PROMPT, (7, 8), (-3.5, -4.0))
    assert (call.temperature, call.policy_version, call.finish_reason, call.text) == (0.7, 4, "stop", "a b")


def test_another_prompt_or_text_leads_nowhere():
    memory = Generations(10, 1.0)
    remember(memory, "a b", (7, 8))
    assert memory.find((1, 2), "a b") is None
    assert memory.find(PROMPT, "a c") is None


def test_equal_texts_get_the_samples_of_their_own_the_last_first():
    memory = Generations(10, 1.0)
    for ids in ((1,), (2,), (3,)):
        remember(memory, "x", ids)
    found = [memory.find(PROMPT, "x", occurrence).completion_ids for occurrence in range(4)]
    assert found == [(3,), (2,), (1,), (3,)]


def test_only_the_newest_version_is_found():
    memory = Generations(10, 1.0)
    remember(memory, "x", (2,), version=2)
    remember(memory, "x", (1,), version=1)
    assert [memory.find(PROMPT, "x", occurrence).completion_ids for occurrence in (0, 1)] == [(2,), (2,)]


def test_the_very_text_comes_before_one_that_reads_the_same():
    memory = Generations(10, 1.0)
    remember(memory, "[[ ## a ## ]]\n1\n\n[[ ## completed ## ]]", (1,))
    remember(memory, "Sure!\n[[ ## a ## ]] 1", (2,))
    written = "[[ ## a ## ]]\n1\n\n[[ ## completed ## ]]\n"
    assert [memory.find(PROMPT, written, occurrence).completion_ids for occurrence in (0, 1)] == [(1,), (2,)]


def test_the_oldest_are_forgotten():
    memory = Generations(2, 1.0)
    for place, text in enumerate("abc"):
        remember(memory, text, (place,), prompt=(place,))
    assert len(memory) == 2
    assert memory.find((0,), "a") is None
    assert memory.find((1,), "b") is not None
    assert memory.find((2,), "c") is not None


def test_what_dspy_writes_anew_reads_as_what_was_sampled():
    written = "[[ ## reasoning ## ]]\nfirst b\n\n[[ ## answer ## ]]\na b\n\n[[ ## completed ## ]]\n"
    sampled = "Let me see.\n[[ ## reasoning ## ]] first b\n[[ ## answer ## ]]\n\n a b \n[[ ## note ## ]]\nbye"
    assert reads_as(sampled, written)
    assert not reads_as(sampled.replace("a b", "a c"), written)
    assert not reads_as("[[ ## answer ## ]]\na b", written)


def test_text_without_fields_must_be_the_same_but_for_white_space():
    assert reads_as("a  b\n", "a b")
    assert not reads_as("a b c", "a b")
    assert not reads_as("[[ ## answer ## ]]\na b", "a b")
