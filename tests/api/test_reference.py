from tests.api.reference import API, markdown


def test_the_document_is_what_the_code_says() -> None:
    document = API.parent / "docs" / "api.md"
    assert document.read_text() == markdown(), "write docs/api.md anew: python -m tests.api.reference >docs/api.md"
