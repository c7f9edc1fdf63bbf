/* Exact sizes of gzip.compress(source + target, level) for many targets, without writing any output.

   deflate is run on the source once; each target continues from there and is taken back. huffman.h knows what a block
   costs, matching.h how zlib finds repeats, stream.h what it makes of them. sizes.py is the only caller: it checks
   this module against the zlib of the Python that it runs in, whose bytes other implementations do not give. */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

#include "grams.h"
#include "stream.h"

#define LONGEST ((int64_t)1 << 30) /* positions are 32 bits wide */
static const char CAPSULE[] = "harness.selection.prepared_targets";

typedef struct {
    const Level *level;
    uint8_t *bytes;
    int64_t *offsets; /* count + 1 */
    Site *sites;      /* one a byte */
    int64_t count, longest;
    Work *spare; /* between calls; a second call at the same time allocates its own */
    int64_t spare_room;
} Prepared;

static void free_work(Work *work)
{
    if (work) {
        free(work->search.text);
        free(work->entries);
        free(work);
    }
}

/* Room for a source of `source_room` bytes and a target of `target_room`. NULL without memory. */
static Work *new_work(int64_t source_room, int64_t target_room)
{
    Work *work = calloc(1, sizeof *work);
    if (!work)
        return NULL;
    work->search.text = malloc((size_t)(source_room + target_room + PADDING));
    /* What is entered for a target: its own positions, and the source's behind those that no target can change. */
    work->entries = malloc((size_t)(target_room + 2 * MIN_LOOKAHEAD) * sizeof *work->entries);
    if (!work->search.text || !work->entries) {
        free_work(work);
        return NULL;
    }
    clear_chains(&work->search);
    return work;
}

static void free_prepared(Prepared *prepared)
{
    if (prepared) {
        free(prepared->bytes);
        free(prepared->offsets);
        free(prepared->sites);
        free_work(prepared->spare);
        free(prepared);
    }
}

static void free_capsule(PyObject *capsule) { free_prepared(PyCapsule_GetPointer(capsule, CAPSULE)); }

/* The targets' own part of the work: 0, or -1 without memory. */
static int survey_all(Prepared *prepared)
{
    Work *work = new_work(prepared->longest, 0);
    if (!work)
        return -1;
    for (int64_t j = 0; j < prepared->count; j++) {
        int64_t start = prepared->offsets[j], length = prepared->offsets[j + 1] - start;
        if (length <= LONGEST_WITH_SITES)
            survey(work, prepared->level, prepared->bytes + start, (int32_t)length, prepared->sites + start);
    }
    free_work(work);
    return 0;
}

/* Whether `offsets` (so many bytes of int64) ascend from 0 to `end`, and the longest text between two: 0, or -1 with an
   exception. */
static int check_offsets(const int64_t *offsets, int64_t bytes, int64_t end, int64_t *longest)
{
    *longest = 0;
    if (bytes < 8 || bytes % 8) {
        PyErr_SetString(PyExc_ValueError, "offsets are int64, one more than there are texts");
        return -1;
    }
    int64_t count = bytes / 8 - 1;
    int ordered = offsets[0] == 0 && offsets[count] == end;
    for (int64_t j = 0; j < count && ordered; j++) {
        int64_t length = offsets[j + 1] - offsets[j];
        ordered = length >= 0;
        if (length > *longest)
            *longest = length;
    }
    if (!ordered)
        PyErr_SetString(PyExc_ValueError, "offsets must ascend from 0 to the buffer's end");
    return ordered ? 0 : -1;
}

/* Copies of both buffers, checked: 0, or -1 with an exception. */
static int take_targets(Prepared *prepared, const Py_buffer *bytes, const Py_buffer *offsets)
{
    if (check_offsets(offsets->buf, offsets->len, bytes->len, &prepared->longest) < 0)
        return -1;
    if (prepared->longest > LONGEST) {
        PyErr_SetString(PyExc_ValueError, "a target holds 1 GiB at most");
        return -1;
    }
    prepared->count = offsets->len / 8 - 1;
    prepared->bytes = malloc((size_t)bytes->len + 1);
    prepared->offsets = malloc((size_t)offsets->len);
    prepared->sites = malloc(((size_t)bytes->len + 1) * sizeof *prepared->sites);
    if (!prepared->bytes || !prepared->offsets || !prepared->sites) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(prepared->bytes, bytes->buf, (size_t)bytes->len);
    memcpy(prepared->offsets, offsets->buf, (size_t)offsets->len);
    return 0;
}

PyDoc_STRVAR(prepare_doc, "prepare(targets, offsets, level) -> capsule\n\n"
                          "targets: bytes-like, all targets one behind the other; offsets: int64, from 0 to its end,\n"
                          "one more than there are targets; level: 1 to 9. Both are copied.");

static PyObject *prepare(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n)
{
    if (n != 3) {
        PyErr_SetString(PyExc_TypeError, "prepare(targets, offsets, level)");
        return NULL;
    }
    long level = PyLong_AsLong(arguments[2]);
    if (level == -1 && PyErr_Occurred())
        return NULL;
    if (level < 1 || level > 9) {
        PyErr_SetString(PyExc_ValueError, "level is 1 to 9");
        return NULL;
    }
    Py_buffer bytes, offsets;
    if (PyObject_GetBuffer(arguments[0], &bytes, PyBUF_SIMPLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(arguments[1], &offsets, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&bytes);
        return NULL;
    }
    PyObject *capsule = NULL;
    Prepared *prepared = calloc(1, sizeof *prepared);
    if (!prepared) {
        PyErr_NoMemory();
    } else if (prepared->level = &LEVELS[level], take_targets(prepared, &bytes, &offsets) == 0) {
        int failed;
        Py_BEGIN_ALLOW_THREADS;
        failed = survey_all(prepared);
        Py_END_ALLOW_THREADS;
        if (failed)
            PyErr_NoMemory();
        else
            capsule = PyCapsule_New(prepared, CAPSULE, free_capsule);
    }
    if (!capsule)
        free_prepared(prepared);
    PyBuffer_Release(&bytes);
    PyBuffer_Release(&offsets);
    return capsule;
}

/* C(source), and C(source ⊕ target) of every target into `sizes`. */
static int64_t measure(const Prepared *prepared, Work *work, const uint8_t *source, int32_t length, int64_t *sizes)
{
    prime(work, prepared->level, source, length);
    for (int64_t j = 0; j < prepared->count; j++) {
        int64_t start = prepared->offsets[j], bytes = prepared->offsets[j + 1] - start;
        /* A stream's first byte is never found again, which a target's sites do not know. */
        const Site *sites = length > 0 && bytes <= LONGEST_WITH_SITES ? prepared->sites + start : NULL;
        sizes[j] = size_with(work, prepared->bytes + start, (int32_t)bytes, sites);
    }
    return size_with(work, source, 0, NULL);
}

/* Texts one behind the other, as Python hands them over. */
typedef struct {
    Py_buffer bytes, offsets;
    const int64_t *starts; /* count + 1 */
    int64_t count, longest;
} Texts;

static void release_texts(Texts *texts)
{
    PyBuffer_Release(&texts->bytes);
    PyBuffer_Release(&texts->offsets);
}

/* 0, or -1 with an exception. */
static int take_texts(Texts *texts, PyObject *bytes, PyObject *offsets)
{
    if (PyObject_GetBuffer(bytes, &texts->bytes, PyBUF_SIMPLE) < 0)
        return -1;
    if (PyObject_GetBuffer(offsets, &texts->offsets, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&texts->bytes);
        return -1;
    }
    texts->starts = texts->offsets.buf;
    texts->count = texts->offsets.len / 8 - 1;
    if (check_offsets(texts->starts, texts->offsets.len, texts->bytes.len, &texts->longest) < 0) {
        release_texts(texts);
        return -1;
    }
    return 0;
}

/* A writable buffer for so many bytes: 0, or -1 with an exception that says what it is for. */
static int take_output(Py_buffer *out, PyObject *argument, int64_t bytes, const char *wanted)
{
    if (PyObject_GetBuffer(argument, out, PyBUF_WRITABLE) < 0)
        return -1;
    if (out->len != bytes) {
        PyBuffer_Release(out);
        PyErr_SetString(PyExc_ValueError, wanted);
        return -1;
    }
    return 0;
}

/* All sizes of all texts: 0, or -1 without memory. Holds no lock meanwhile. */
static int measure_all(Prepared *prepared, const Texts *texts, int64_t *alone, int64_t *together)
{
    Work *work = NULL;
    if (prepared->spare_room >= texts->longest) {
        work = prepared->spare;
        prepared->spare = NULL;
    }
    int64_t room = work ? prepared->spare_room : larger((int32_t)texts->longest, 1 << 16);
    Py_BEGIN_ALLOW_THREADS;
    if (!work)
        work = new_work(room, prepared->longest);
    for (int64_t i = 0; work && i < texts->count; i++) {
        const uint8_t *text = (const uint8_t *)texts->bytes.buf + texts->starts[i];
        int32_t length = (int32_t)(texts->starts[i + 1] - texts->starts[i]);
        alone[i] = measure(prepared, work, text, length, together + i * prepared->count);
    }
    Py_END_ALLOW_THREADS;
    if (!work)
        return -1;
    free_work(prepared->spare);
    prepared->spare = work;
    prepared->spare_room = room;
    return 0;
}

PyDoc_STRVAR(sizes_doc, "sizes(prepared, sources, offsets, alone, together)\n\n"
                        "sources and offsets: like prepare's. alone, a writable int64 buffer with room for a number a\n"
                        "source, becomes len(gzip.compress(source, level)); together, with room for one a source and\n"
                        "target, len(gzip.compress(source + target, level)), a source's one behind the other.");

static PyObject *sizes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n)
{
    if (n != 5) {
        PyErr_SetString(PyExc_TypeError, "sizes(prepared, sources, offsets, alone, together)");
        return NULL;
    }
    Prepared *prepared = PyCapsule_GetPointer(arguments[0], CAPSULE);
    Texts texts;
    if (!prepared || take_texts(&texts, arguments[1], arguments[2]) < 0)
        return NULL;
    PyObject *result = NULL;
    Py_buffer alone, together;
    if (take_output(&alone, arguments[3], texts.count * 8, "alone needs one int64 a source") == 0) {
        int64_t pairs = texts.count * prepared->count;
        if (take_output(&together, arguments[4], pairs * 8, "together needs one int64 a source and target") == 0) {
            if (texts.longest + prepared->longest > LONGEST)
                PyErr_SetString(PyExc_ValueError, "source and target hold 1 GiB at most");
            else if (measure_all(prepared, &texts, alone.buf, together.buf) < 0)
                PyErr_NoMemory();
            else
                result = Py_NewRef(Py_None);
            PyBuffer_Release(&together);
        }
        PyBuffer_Release(&alone);
    }
    release_texts(&texts);
    return result;
}

PyDoc_STRVAR(grams_doc, "grams(weights, sources, offsets, out)\n\n"
                        "weights: uint16 [65536], of every hash of four bytes; sources and offsets: like prepare's. out,\n"
                        "a writable int64 buffer with room for two numbers a source, becomes how many different hashes\n"
                        "it has, and the sum of their weights.");

static PyObject *grams(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n)
{
    if (n != 4) {
        PyErr_SetString(PyExc_TypeError, "grams(weights, sources, offsets, out)");
        return NULL;
    }
    Texts texts;
    if (take_texts(&texts, arguments[1], arguments[2]) < 0)
        return NULL;
    PyObject *result = NULL;
    Py_buffer weights, out;
    if (PyObject_GetBuffer(arguments[0], &weights, PyBUF_SIMPLE) == 0) {
        if (weights.len != GRAM_HASHES * 2) {
            PyErr_SetString(PyExc_ValueError, "weights are uint16, 65,536 of them");
        } else if (take_output(&out, arguments[3], texts.count * 16, "out needs two int64 a source") == 0) {
            int64_t *numbers = out.buf;
            Py_BEGIN_ALLOW_THREADS;
            for (int64_t i = 0; i < texts.count; i++) {
                const uint8_t *text = (const uint8_t *)texts.bytes.buf + texts.starts[i];
                int64_t length = texts.starts[i + 1] - texts.starts[i];
                numbers[2 * i] = count_grams(weights.buf, text, length, &numbers[2 * i + 1]);
            }
            Py_END_ALLOW_THREADS;
            PyBuffer_Release(&out);
            result = Py_NewRef(Py_None);
        }
        PyBuffer_Release(&weights);
    }
    release_texts(&texts);
    return result;
}

static PyMethodDef METHODS[] = {
    {"prepare", (PyCFunction)(void (*)(void))prepare, METH_FASTCALL, prepare_doc},
    {"sizes", (PyCFunction)(void (*)(void))sizes, METH_FASTCALL, sizes_doc},
    {"grams", (PyCFunction)(void (*)(void))grams, METH_FASTCALL, grams_doc},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *Py_UNUSED(module))
{
    fill_code_tables();
    return 0;
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, (void *)execute}, {0, NULL}};

static PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "deflate_sizes", "Exact gzip sizes without output.", 0, METHODS, SLOTS, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_deflate_sizes(void) { return PyModuleDef_Init(&MODULE); }
