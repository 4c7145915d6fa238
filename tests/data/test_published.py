"""Data as its authors or the hub publish it, oddities and all: little copies with the published names and fields."""

import json

import pytest
from layouts import LAYOUTS, jpeg, save

from fastln.data import DataOptions, load_source
from fastln.errors import FastLNError


def write(file, rows, lines=False):
    return save(file, ("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=2)).encode())


def asked(samples):
    return [(sample.image, sample.question, sample.answer, sample.closed) for sample in samples]


def hub_file(file, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.null()})
    schema = pyarrow.schema({"image": image, "question": pyarrow.string(), "answer": pyarrow.string()})
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": jpeg(n), "path": None}, "question": q, "answer": a} for n, q, a in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file, row_group_size=100)


def osf_row(qid, phrase_type, question, answer, answer_type, frame="NULL"):
    return {
        "qid": qid,
        "phrase_type": phrase_type,
        "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
        "image_case_url": "https://medpix.nlm.nih.gov/case?id=48e1dd0e-8552-46ad-a354-5eb55be86de6",
        "image_name": "synpic54610.jpg",
        "image_organ": "HEAD",
        "evaluation": "not evaluated",
        "question": question,
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": frame,
        "question_type": "PRES",
        "answer": answer,
        "answer_type": answer_type,
    }


def test_vqa_rad_of_its_authors(tmp_path):
    rows = [
        osf_row("0", "freeform", "Are regions  infarcted?", "Yes", "CLOSED", "Is there evidence of\tinfarction?"),
        osf_row(1, "test_para", "How many lesions?", 2, "OPEN"),
        osf_row(2, "test_freeform", "Is it normal?", "no\t", "CLOSED "),
        osf_row(3, "para", "Where is it?", "Left lobe", "OPEN"),
    ]
    write(tmp_path / "VQA_RAD Dataset Public.json", rows)
    folder = tmp_path / "VQA_RAD Image Folder"
    save(tmp_path / f"{folder.name}.zip", b"")
    with pytest.raises(FastLNError, match=rf"{folder}\.zip: unpack the images first, into {folder}"):
        load_source(str(tmp_path))
    save(folder / "synpic54610.jpg", jpeg(0))
    source = load_source(str(tmp_path))
    assert [(s.question, s.answer) for s in source.splits["train"]] == [
        ("Are regions infarcted?", "Yes"),
        ("Is there evidence of infarction?", "Yes"),
        ("Where is it?", "Left lobe"),
    ]
    assert [(s.answer, s.closed) for s in source.splits["test"]] == [("2", False), ("no", True)]


def test_vqa_rad_of_the_hub(tmp_path):
    folder = tmp_path / "vqa-rad"
    save(folder / "README.md", b"---\nlicense: cc0-1.0\n---\n")
    save(folder / "scripts" / "processing.py", b"")
    hub_file(folder / "data" / "train-00000-of-00001-eb8844602202be60.parquet", [(0, "is it?", "yes"), (0, "a?", "b")])
    hub_file(folder / "data" / "test-00000-of-00001-e5bc3d208bb4deeb.parquet", [(1, "is it?", "no")])
    source = load_source(str(folder))
    assert source.name == "vqa-rad"
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 2, "test": 1}
    assert source.dataset("test").image(source.splits["test"][0].image).size == (48, 64)


def test_path_vqa_of_the_hub(tmp_path):
    folder = tmp_path / "path-vqa"
    for split, n_files in (("train", 3), ("validation", 1), ("test", 1)):
        for number in range(n_files):
            file = folder / "data" / f"{split}-{number:05d}-of-{n_files:05d}-0123456789abcdef.parquet"
            hub_file(file, [(number, "where are liver stem cells (oval cells) located?", f"in {split}")])
    splits = load_source(str(folder), DataOptions(layout="path-vqa")).splits
    assert splits == load_source(str(folder)).splits
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 3, "validation": 1, "test": 1}


def test_slake_in_a_folder_of_its_own_and_what_else_lies_there(tmp_path):
    LAYOUTS["slake"].make(tmp_path / "Slake1.0")
    for name in ("mask.png", "detection.json", "question.json"):
        save(tmp_path / "Slake1.0" / "imgs" / "xmlab0" / name, b"[]")
    save(tmp_path / "Slake1.0" / "KG" / "en_disease.csv", b"heart#symptom#pain\n")
    assert load_source(str(tmp_path / "Slake1.0")).name == "slake"
    with pytest.raises(FastLNError, match=rf"; {tmp_path / 'Slake1.0'} is slake: give that\. The known ones:"):
        load_source(str(tmp_path))


def test_mimic_cxr_as_r2gen_has_it(tmp_path):
    path = "p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg"
    save(tmp_path / "images" / path, jpeg(0))
    row = {
        "id": "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014",
        "study_id": 50414267,
        "subject_id": 10000032,
        "report": "                                 FINAL REPORT\n FINDINGS:\n \n There is no focal consolidation .",
        "image_path": [path],
    }
    write(tmp_path / "annotation.json", {split: [row | {"split": split}] for split in ("train", "val", "test")})
    (sample,) = load_source(str(tmp_path)).splits["validation"]
    assert sample.images == (path,)
    assert sample.answer == "FINAL REPORT FINDINGS: There is no focal consolidation ."


DOMAIN = {"chest_xray": False, "mri": False, "histology": True, "gross": False, "ct_scan": False}


def instructed(field, *values):
    turns = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return {"id": "18063892_F3", "image": "18063892_F3.jpg", "domain": DOMAIN, field: turns}


def test_llava_med_as_its_download_lays_it_out(tmp_path):
    save(tmp_path / "images" / "18063892_F3.jpg", jpeg(0))
    instruct = write(
        tmp_path / "instruct" / "llava_med_instruct_60k_inline_mention.json",
        [
            instructed("conversations", "<image>\nWhat is it?", "A cyst.", "Where?", "In the conjunctiva."),
            instructed("conversations", "Where is it?\n<image>", "In the eye."),
            instructed("conversations", "Is it normal?", "No."),  # the turn with the image is lost in places
        ],
    )
    alignment = write(
        tmp_path / "alignment" / "llava_med_alignment_500k.json",
        [instructed("conversatons", "Describe the image concisely.\n<image>", "A cystic wall.")],
    )
    evaluation = {
        "question_id": 0,
        "image": "18063892_F3.jpg",
        "pair_id": "18063892_F3",
        "text": "What is the organ in the image?\n<image>",
        "gpt4_answer": "The conjunctiva.",
        "fig_caption": "The finding (H & E stain, ×100)",
        "in_text_mention": [{"tokens": "( Fig. 3 )", "entities": [{"type": "figure", "entity_id": "3"}]}],
        "domain": DOMAIN,
        "type": "conversation",
        "fig_label": "Fig. 3",
    }
    qa50 = write(tmp_path / "eval" / "llava_med_eval_qa50_qa.jsonl", [evaluation], lines=True)
    first, *others = load_source(str(instruct)).splits["train"]
    assert first.history == (("What is it?", "A cyst."),)
    assert [(sample.question, sample.answer) for sample in (first, *others)] == [
        ("Where?", "In the conjunctiva."),
        ("Where is it?", "In the eye."),
        ("Is it normal?", "No."),
    ]
    (caption,) = load_source(str(alignment)).splits["train"]
    assert (caption.question, caption.answer) == ("Describe the image concisely.", "A cystic wall.")
    source = load_source(str(qa50))
    assert asked(source.splits["train"]) == [
        ("18063892_F3.jpg", "What is the organ in the image?", "The conjunctiva.", None)
    ]
    assert source.splits["train"][0].id == "0"
    assert source.dataset("train").image("18063892_F3.jpg").size == (48, 64)


@pytest.mark.parametrize(("closed", "open_"), [("CLOSED", "OPEN"), ("yes/no", "other")])
def test_question_sets_in_llava_meds_form(tmp_path, closed, open_):
    def row(answer, answer_type):
        return instructed("conversatons", "How is it?\n<image>", answer) | {"answer_type": answer_type}

    save(tmp_path / "images" / "18063892_F3.jpg", jpeg(0))
    write(tmp_path / "train.json", [row("yes", closed), row(12, open_)])
    write(tmp_path / "test.json", [row("no", closed)])
    splits = load_source(str(tmp_path)).splits
    assert list(splits) == ["train", "test"]
    assert [(sample.answer, sample.closed) for sample in splits["train"]] == [("yes", True), ("12", False)]
