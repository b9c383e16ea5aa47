"""A file is whole, the old one or the new one."""

import pytest

from svae_lib.files import whole


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "a.json"
    with whole(path) as new:
        new.write_text("first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole(path) as new:
        new.write_text("sec")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
