"""An index of image features in a PostgreSQL database with pgvector."""

import contextlib
from urllib.parse import parse_qs, urlsplit

from tools.search.index import TRACK, UPDATES, Entry, Filter, Index, tables, track_key
from utils import InputError

EXACT = 200_000  # where filters leave at most so many images, all are compared: a graph misses most of few among many
CANDIDATES = 3  # of the graph, which has halves of float32, for each image that is returned by exact distance
EF_SEARCH = 1000  # candidates within the graph: the most that pgvector allows
EF_CONSTRUCTION = 128  # of the graph: with pgvector's 64, it is made in two thirds of the time and misses far more
COLUMNS = (
    "SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute "
    "WHERE attrelid = to_regclass(?) AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
)
TEXT = ("text", True)
TYPES = {
    "versions": {"version": ("bigint", True), "checkpoint": TEXT, "sha256": TEXT, "feature": TEXT}
    | {"dim": ("integer", True)},
    "images": {"id": ("bigint", True), "version": ("integer", True), "path": TEXT, "stamp": TEXT, "modality": TEXT}
    | {"camera": ("text", False), "person": ("text", False), "time": TEXT, "vector": ("vector", True)}
    | {"track": ("text", False)},
}
# Where the database is a cluster of Citus, its machines share the images by path; all of them know the versions.
SPREAD = (
    "ALTER TABLE images DROP CONSTRAINT images_pkey, REPLICA IDENTITY USING INDEX images_path_version_key",
    "CREATE INDEX images_by_id ON images (id)",
    "SELECT create_reference_table('versions')",
    "SELECT create_distributed_table('images', 'path')",
)


class ServerIndex(Index):
    """A PostgreSQL database with pgvector. Searches are exact until `approximate` makes a graph of a version."""

    approximates = True
    for_update, lock_images = " FOR UPDATE", "LOCK TABLE images IN SHARE ROW EXCLUSIVE MODE"

    def __init__(self, uri, create=False):
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise InputError(f"{uri}: is no address; pass postgresql://USER@HOST:PORT/DATABASE") from error
        if parts.password or "password" in parse_qs(parts.query):
            raise InputError("--index: leave the password out of the address; set PGPASSWORD in the environment")
        try:
            import pgvector.psycopg
            import psycopg
        except ImportError as error:
            install = 'python -m pip install "psycopg[binary]>=3.2.3" "pgvector>=0.5"'
            raise InputError(f"{uri}: needs {install} ({error})") from error
        self.uri, self.driver, self.register, self.connection = uri, psycopg, pgvector.psycopg.register_vector, None
        with self._errors():
            self._connect(create)

    def _connect(self, create=False):
        self.connection = self.driver.connect(self.uri, autocommit=True, connect_timeout=10)
        self.cluster = self._run("SELECT 1 FROM pg_extension WHERE extname = 'citus'").fetchone()
        if self.cluster:
            self._run("SET citus.propagate_set_commands = 'local'")  # what sets up a graph's search
            self._run("SET citus.multi_shard_modify_mode = 'sequential'")  # to change images and versions at once
        with self.connection.transaction():
            self._run("SELECT pg_advisory_xact_lock(7316)")  # two processes must not make the tables at once
            exists = self._run("SELECT to_regclass('images')").fetchone()[0]
            if not (exists or create):
                raise InputError(f"{self.uri}: contains no index; make it with python -m tools.search index")
            if not exists:
                self._run("CREATE EXTENSION IF NOT EXISTS vector")
                for sql in (*tables("BIGSERIAL PRIMARY KEY", "vector", ""), *(SPREAD if self.cluster else ())):
                    self._run(sql)
            ours = {name: [(n, *t) for n, t in columns.items()] for name, columns in TYPES.items()}
            found = {name: self._run(COLUMNS, (name,)).fetchall() for name in ours}
            if found == ours | {"images": ours["images"][:-1]}:  # as they were before there were tracks
                for sql in UPDATES:
                    self._run(sql)
            elif found != ours:
                raise InputError(
                    f"{self.uri}: its tables are not those of an index; pass another database, or drop the tables "
                    "images and versions"
                )
        self.register(self.connection)

    @staticmethod
    def _remedy(_):
        return "check the address, the server and PGPASSWORD, and run again"

    @contextlib.contextmanager
    def transaction(self, write=True):
        with self._errors():
            if self.connection.closed:  # the server was restarted
                self._connect()
            with self.connection.transaction():
                yield

    def _run(self, sql, values=()):
        return self.connection.execute(sql.replace("?", "%s"), values, binary=True)

    def _run_many(self, sql, rows):
        self.connection.cursor().executemany(sql.replace("?", "%s"), rows)

    def _encode(self, vector):
        return vector

    def _decode(self, value):
        return value.to_numpy()

    def bytes(self):
        """Size of the images with their vectors and indexes."""
        with self.transaction(write=False):
            kind = "citus" if self.cluster else "pg"
            return self._run(f"SELECT {kind}_total_relation_size('images')").fetchone()[0]

    def switch(self, version):
        missing = super().switch(version)
        if not missing:
            with self.transaction():
                for (name,) in self._run(
                    "SELECT indexname FROM pg_indexes WHERE indexname ~ '^graph_[0-9]+$'"
                ).fetchall():
                    if int(name.removeprefix("graph_")) < version:
                        self._run(f"DROP INDEX IF EXISTS {name}")
        return missing

    def approximate(self, version, dim):
        """Make a graph of a version's vectors, in halves of float32, or keep the one that there is."""
        with self.transaction():
            if self.cluster:
                self._run("SET LOCAL citus.multi_shard_modify_mode = 'parallel'")
            self._run(
                f"CREATE INDEX IF NOT EXISTS graph_{version} ON images USING hnsw ((vector::halfvec({dim})) "
                f"halfvec_ip_ops) WITH (ef_construction = {EF_CONSTRUCTION}) WHERE version = {version}"
            )

    def search(self, version, queries, top, where=Filter()):  # noqa: B008 (a constant)
        """As `FileIndex.search`."""
        condition, values = where.where(version)
        names, half, results = ("id", *Entry._fields), f"halfvec({queries.shape[1]})", []
        select = f"SELECT {', '.join(names)}, -(vector <#> ?) FROM {{}} ORDER BY vector <#> ?, id LIMIT ?"
        exact = select.format(f"images WHERE {condition}")
        nearest = f"{condition} AND version = {version} ORDER BY vector::{half} <#> ?::{half} LIMIT ?"
        by_graph = select.format(f"(SELECT * FROM images WHERE {nearest}) AS candidates")
        with self.transaction(write=False):
            graph = self._run(f"SELECT to_regclass('graph_{version}')").fetchone()[0]
            if graph and any(where):
                left = f"SELECT 1 FROM images WHERE {condition} LIMIT {EXACT + 1}"
                graph = self._run(f"SELECT count(*) FROM ({left}) AS remaining", values).fetchone()[0] > EXACT
            if graph:
                self._run("SET LOCAL hnsw.iterative_scan = strict_order")
                self._run(f"SET LOCAL hnsw.ef_search = {EF_SEARCH}")
            for query in queries:
                rows = []
                if graph:
                    rows = self._run(by_graph, (query, *values, query, CANDIDATES * top, query, top)).fetchall()
                if len(rows) < top:  # also where the graph has given up
                    rows = self._run(exact, (query, *values, query, top)).fetchall()
                results.append(self._results(rows))
        return results

    def search_tracks(self, version, queries, top, where=Filter()):  # noqa: B008 (a constant)
        """As `FileIndex.search_tracks`."""
        condition, values = where.where(version)
        names, key, results = ("id", *Entry._fields), f"modality, camera, {TRACK}", []
        mean = f"SELECT {key}, -(l2_normalize(sum(vector)) <#> ?) AS similarity FROM images WHERE {condition} "
        mean += f"GROUP BY {key} ORDER BY similarity DESC, {key} LIMIT ?"
        best = f"SELECT DISTINCT ON ({key}) {', '.join(names)}, 0 FROM images WHERE {condition} AND {TRACK} = ANY(?) "
        best += f"ORDER BY {key}, vector <#> ?, id"
        with self.transaction(write=False):
            for query in queries:
                means = {row[:3]: row[3] for row in self._run(mean, (query, *values, top)).fetchall()}
                rows = self._run(best, (*values, [name for *_, name in means], query)).fetchall()
                found = {track_key(image): image for image in self._results(rows)}
                # A track may have been removed between the two statements.
                results.append([found[key] | {"similarity": s} for key, s in means.items() if key in found])
        return results

    def _results(self, rows):
        """Rows of id, the fields of `Entry` and a similarity -> dicts."""
        entries = self._checked([row[1:-1] for row in rows], Entry)
        return [
            {"id": row[0], **entry._asdict(), "similarity": row[-1]} for row, entry in zip(rows, entries, strict=True)
        ]
