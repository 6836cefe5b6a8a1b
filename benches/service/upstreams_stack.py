"""Upstream's stack with the same records: Flask, records in memory, each passed through marshmallow; gunicorn runs it.

`plain` leaves marshmallow out. Both are beside the routes of the service that the benchmarks ask for.
"""

import datetime
import os
import uuid

from flask import Flask, jsonify
from marshmallow import Schema, fields


class Record:
    def __init__(self, **values):
        self.__dict__.update(values)


class LinkSchema(Schema):
    path = fields.Str(required=True)
    etag = fields.Str()
    type = fields.Str(required=True)


class ImageSchema(Schema):
    name = fields.Str(required=True)
    link = fields.Nested(LinkSchema)
    arch = fields.Str()
    metadata = fields.Dict(keys=fields.Str(), values=fields.Str())
    id = fields.UUID()
    created = fields.DateTime()


def image(number):
    own = uuid.uuid4()
    link = Record(path=f"s3://boot-images/{own}/manifest.json", etag="0" * 32, type="s3")
    return Record(name=f"image-{number}", link=link, arch="x86_64", metadata={}, id=own, created=datetime.datetime.now())


IMAGES = {str(one.id): one for one in map(image, range(int(os.environ["IMAGES"])))}
SCHEMA = ImageSchema()
app = Flask("upstream")
plain = Flask("plain")
for each in app, plain:
    each.get("/healthz/live")(lambda: {})


@app.get("/v3/images")
def dumped_list():
    return jsonify(SCHEMA.dump(IMAGES.values(), many=True))


@app.get("/v3/images/<own>")
def dumped_image(own):
    return jsonify(SCHEMA.dump(IMAGES[own]))


DICTIONARIES = SCHEMA.dump(IMAGES.values(), many=True)


@plain.get("/v3/images")
def plain_list():
    return jsonify(DICTIONARIES)
