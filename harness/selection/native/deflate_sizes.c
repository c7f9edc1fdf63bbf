/* Exact sizes of gzip.compress(source + target, level) for many targets, without writing any output.

   deflate is run on the source once; each target continues from there and is taken back. huffman.h knows what a block
   costs, matching.h how zlib finds repeats, stream.h what it makes of them. sizes.py is the only caller: it checks
   this module against the zlib of the Python that it runs in, whose bytes other implementations do not give. */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

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

/* Copies of both buffers, checked: 0, or -1 with an exception. */
static int take_targets(Prepared *prepared, const Py_buffer *bytes, const Py_buffer *offsets)
{
    if (offsets->len < 8 || offsets->len % 8) {
        PyErr_SetString(PyExc_ValueError, "offsets are int64, one more than there are targets");
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
    int ordered = prepared->offsets[0] == 0 && prepared->offsets[prepared->count] == bytes->len;
    for (int64_t j = 0; j < prepared->count && ordered; j++) {
        int64_t length = prepared->offsets[j + 1] - prepared->offsets[j];
        ordered = length >= 0;
        if (length > prepared->longest)
            prepared->longest = length;
    }
    if (!ordered || prepared->longest > LONGEST) {
        PyErr_SetString(PyExc_ValueError, "offsets must ascend from 0 to the buffer's end, a target hold 1 GiB at most");
        return -1;
    }
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

PyDoc_STRVAR(sizes_doc, "sizes(prepared, source, out) -> int\n\n"
                        "out: a writable int64 buffer with room for one number a target, which becomes\n"
                        "len(gzip.compress(source + target, level)); returns len(gzip.compress(source, level)).");

static PyObject *sizes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n)
{
    if (n != 3) {
        PyErr_SetString(PyExc_TypeError, "sizes(prepared, source, out)");
        return NULL;
    }
    Prepared *prepared = PyCapsule_GetPointer(arguments[0], CAPSULE);
    if (!prepared)
        return NULL;
    Py_buffer source, out;
    if (PyObject_GetBuffer(arguments[1], &source, PyBUF_SIMPLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(arguments[2], &out, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&source);
        return NULL;
    }
    PyObject *result = NULL;
    if (out.len != prepared->count * 8) {
        PyErr_SetString(PyExc_ValueError, "out needs one int64 a target");
    } else if (source.len + prepared->longest > LONGEST) {
        PyErr_SetString(PyExc_ValueError, "source and target hold 1 GiB at most");
    } else {
        Work *work = NULL;
        if (prepared->spare_room >= source.len) {
            work = prepared->spare;
            prepared->spare = NULL;
        }
        int64_t room = work ? prepared->spare_room : larger((int32_t)source.len, 1 << 16), size = 0;
        Py_BEGIN_ALLOW_THREADS;
        if (!work)
            work = new_work(room, prepared->longest);
        if (work)
            size = measure(prepared, work, source.buf, (int32_t)source.len, out.buf);
        Py_END_ALLOW_THREADS;
        if (work) {
            free_work(prepared->spare);
            prepared->spare = work;
            prepared->spare_room = room;
            result = PyLong_FromLongLong(size);
        } else {
            PyErr_NoMemory();
        }
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef METHODS[] = {
    {"prepare", (PyCFunction)(void (*)(void))prepare, METH_FASTCALL, prepare_doc},
    {"sizes", (PyCFunction)(void (*)(void))sizes, METH_FASTCALL, sizes_doc},
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
