"""Toy files of boxes and results."""

import json


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def flat_boxes(path, areas):
    return write(path, *({"question_id": key, "area": area} for key, area in areas.items()))


def rows_of(scores):
    return [{"id": key, "score": score} for key, score in scores.items()]


def ocr_word(word, width, height):
    box = {"width": width, "height": height, "rotation": 2.5, "roll": 0, "top_left_x": 0.1, "top_left_y": 0.2}
    return {"word": word, "bounding_box": box}
