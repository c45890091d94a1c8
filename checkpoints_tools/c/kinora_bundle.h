/* kinora_bundle.h: read a Kinora bundle from C99 or C++, with nothing but the C library and mmap.
 *
 * In exactly one source file, before any other header:
 *
 *     #define KINORA_BUNDLE_IMPLEMENTATION
 *     #include "kinora_bundle.h"
 *
 * Everywhere else include it alone. Then:
 *
 *     kinora_error error;
 *     kinora_tensor weight;
 *     kinora_bundle *bundle = kinora_bundle_open("tiny-bundle", &error);
 *     if (!bundle) { fprintf(stderr, "%s\n", error.message); return 1; }
 *     if (kinora_bundle_find(bundle, "dit.head.head.weight", &weight, &error) != KINORA_OK) { ... }
 *     ... weight.dtype, weight.rank, weight.shape, weight.data, weight.scale ...
 *     kinora_bundle_close(bundle);
 *
 * `open` checks every length and offset of the index, so that what it hands out lies inside of the mapped files; it
 * reads no weights. `verify` reads them all and compares checksums. An open bundle is never written to and may be used
 * by several threads; its pointers are valid until `close`. Do not change the files meanwhile.
 *
 * Files are mapped with POSIX mmap. With -DKINORA_BUNDLE_READ they are read into memory instead (fopen, fread), for
 * systems without mmap and for tools that check memory; tensors are then aligned as malloc aligns. On Windows that is
 * the only way. Either way a weight file must fit into the address space: where pointers have 32 bits, 2 GB. A bundle
 * with a larger one is refused with KINORA_NO_MEMORY; KINORA_LARGEST_FILE, in bytes, may be defined smaller. It says
 * nothing of the index, which has 256 MiB at most.
 * The format is docs/bundles.md. Apache License 2.0.
 */
#ifndef KINORA_BUNDLE_H
#define KINORA_BUNDLE_H

#if defined(KINORA_BUNDLE_IMPLEMENTATION) && !defined(KINORA_BUNDLE_READ)
#if !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#if !defined(_FILE_OFFSET_BITS)
#define _FILE_OFFSET_BITS 64
#endif
#endif

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KINORA_MAX_RANK 8

typedef enum kinora_status {
    KINORA_OK = 0,
    KINORA_CANNOT_READ = 1,  /* a file is missing, or cannot be read or mapped */
    KINORA_BAD_INDEX = 2,    /* bundle.idx breaks a rule of the format */
    KINORA_BAD_FILE = 3,     /* a weight file is not the one that the index describes */
    KINORA_BAD_CHECKSUM = 4, /* bytes differ from those that were written */
    KINORA_NO_MEMORY = 5,    /* or a weight file is larger than this program can address */
    KINORA_NOT_FOUND = 6     /* there is no tensor of that name or number */
} kinora_status;

typedef struct kinora_error {
    kinora_status status;
    char message[256];
} kinora_error;

typedef enum kinora_dtype {
    KINORA_F64 = 1,
    KINORA_F32 = 2,
    KINORA_F16 = 3,
    KINORA_BF16 = 4,
    KINORA_F8_E4M3 = 5, /* 4 exponent bits, bias 7, 3 mantissa bits, no infinities, NaN is S.1111.111 */
    KINORA_F8_E5M2 = 6,
    KINORA_I64 = 7,
    KINORA_I32 = 8,
    KINORA_I16 = 9,
    KINORA_I8 = 10,
    KINORA_U8 = 11,
    KINORA_BOOL = 12
} kinora_dtype;

/* One tensor, row-major. Where `scale` is not NULL, row i of the tensor means data[i] * scale[i], or data[i] * scale[0]
 * when scale_count is 1. */
typedef struct kinora_tensor {
    const char *name;                  /* "<part>.<key>": "dit.blocks.0.ffn.0.weight" */
    kinora_dtype dtype;
    uint32_t rank;
    uint64_t shape[KINORA_MAX_RANK];   /* the first `rank` count */
    uint64_t strides[KINORA_MAX_RANK]; /* in numbers, not bytes */
    uint64_t count;                    /* numbers in all */
    uint64_t size;                     /* bytes in all */
    const void *data;
    const float *scale;                /* NULL, or scale_count factors */
    uint64_t scale_count;              /* 0, 1, or shape[0] */
    uint32_t number;                   /* its place in the bundle, from 0 */
} kinora_tensor;

typedef struct kinora_bundle kinora_bundle;

/* Map the bundle in `folder`; NULL with `error` filled when it cannot be used. `error` may be NULL everywhere. */
kinora_bundle *kinora_bundle_open(const char *folder, kinora_error *error);
void kinora_bundle_close(kinora_bundle *bundle); /* NULL is allowed */

/* Tensors have the numbers 0 .. count - 1: file by file, in each in the order in which a model reads them. */
uint32_t kinora_bundle_count(const kinora_bundle *bundle);
kinora_status kinora_bundle_tensor(const kinora_bundle *bundle, uint32_t number, kinora_tensor *tensor,
                                   kinora_error *error);
kinora_status kinora_bundle_find(const kinora_bundle *bundle, const char *name, kinora_tensor *tensor,
                                 kinora_error *error);

/* Compare the checksums of every byte of the weight files with those of the index. */
kinora_status kinora_bundle_verify(const kinora_bundle *bundle, kinora_error *error);

const char *kinora_dtype_name(kinora_dtype dtype); /* "BF16", as safetensors says it; "?" for no dtype */
uint32_t kinora_dtype_size(kinora_dtype dtype);    /* bytes a number; 0 for no dtype */

/* One number as a float. */
float kinora_from_bf16(uint16_t bits);
float kinora_from_f16(uint16_t bits);
float kinora_from_f8_e4m3(uint8_t bits);

#ifdef __cplusplus
}
#endif

#endif /* KINORA_BUNDLE_H */

#if defined(KINORA_BUNDLE_IMPLEMENTATION) && !defined(KINORA_BUNDLE_IMPLEMENTED)
#define KINORA_BUNDLE_IMPLEMENTED

#if defined(_WIN32) && !defined(KINORA_BUNDLE_READ)
#error "kinora_bundle.h maps files with POSIX mmap; on Windows define KINORA_BUNDLE_READ to read them into memory"
#endif

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if !defined(KINORA_BUNDLE_READ)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KINORA__HEADER = 64,
    KINORA__FILE = 32,
    KINORA__TENSOR = 128,
    KINORA__CHECKED_FROM = 28,
    KINORA__ALIGNMENT = 64,
    KINORA__PAGE = 4096,
    KINORA__PAGED = 65536,
    KINORA__MAX_FILES = 1024
};
#define KINORA__MAX_INDEX ((uint64_t)1 << 28)
#define KINORA__LARGEST (((uint64_t)1 << 63) - 1)
#define KINORA__NO_SCALE 0xFFFFFFFFu
#if !defined(KINORA_LARGEST_FILE)
#define KINORA_LARGEST_FILE ((uint64_t)((size_t)-1 >> 1)) /* no object of C is larger */
#endif

typedef struct kinora__memory {
    const unsigned char *bytes;
    uint64_t size;
} kinora__memory;

struct kinora_bundle {
    kinora__memory index;
    kinora__memory *maps;       /* one a file; bytes NULL until it is mapped */
    uint32_t files, tensors;
    const unsigned char *file_table, *tensor_table, *order;
    const char *strings;
    uint64_t strings_size;
    uint32_t crc[8][256];
};

typedef struct kinora__file {
    const char *name;
    uint32_t name_size, checksum;
    uint64_t size, data_offset;
} kinora__file;

typedef struct kinora__record {
    const char *name;
    uint32_t name_size, file, dtype, rank, checksum, scale;
    uint64_t offset, size, count;
    uint64_t shape[KINORA_MAX_RANK];
} kinora__record;

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static kinora_status kinora__fail(kinora_error *error, kinora_status status, const char *format, ...) {
    va_list values;
    if (error) {
        error->status = status;
        va_start(values, format);
        vsnprintf(error->message, sizeof error->message, format, values);
        va_end(values);
    }
    return status;
}

static kinora_status kinora__done(kinora_error *error) {
    if (error) {
        error->status = KINORA_OK;
        error->message[0] = 0;
    }
    return KINORA_OK;
}

static uint32_t kinora__u32(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t kinora__u64(const unsigned char *p) { return kinora__u32(p) | (uint64_t)kinora__u32(p + 4) << 32; }

/* CRC-32 of zlib (polynomial 0xEDB88320, reflected), eight bytes at a time. */
static void kinora__crc_tables(uint32_t table[8][256]) {
    uint32_t i, bit, row;
    for (i = 0; i < 256; i++) {
        uint32_t value = i;
        for (bit = 0; bit < 8; bit++) value = value & 1 ? 0xEDB88320u ^ value >> 1 : value >> 1;
        table[0][i] = value;
    }
    for (row = 1; row < 8; row++)
        for (i = 0; i < 256; i++) table[row][i] = table[row - 1][i] >> 8 ^ table[0][table[row - 1][i] & 255];
}

static uint32_t kinora__crc(const kinora_bundle *b, const unsigned char *p, uint64_t size) {
    uint32_t crc = 0xFFFFFFFFu;
    while (size >= 8) {
        uint32_t low = kinora__u32(p) ^ crc, high = kinora__u32(p + 4);
        crc = b->crc[7][low & 255] ^ b->crc[6][low >> 8 & 255] ^ b->crc[5][low >> 16 & 255] ^ b->crc[4][low >> 24] ^
              b->crc[3][high & 255] ^ b->crc[2][high >> 8 & 255] ^ b->crc[1][high >> 16 & 255] ^ b->crc[0][high >> 24];
        p += 8;
        size -= 8;
    }
    while (size--) crc = crc >> 8 ^ b->crc[0][(crc ^ *p++) & 255];
    return ~crc;
}

#if defined(KINORA_BUNDLE_READ) && defined(_WIN32)
#define kinora__seek _fseeki64 /* a long has 32 bits there */
#define kinora__tell _ftelli64
#elif defined(KINORA_BUNDLE_READ)
#define kinora__seek fseek
#define kinora__tell ftell
#endif

/* A whole file of up to `largest` bytes, which fit into the address space: KINORA__MAX_INDEX for the index, at most
 * KINORA_LARGEST_FILE for a weight file. An empty one is refused: nothing of a bundle is empty. */
static kinora_status kinora__map(const char *path, uint64_t largest, kinora__memory *memory, kinora_error *error) {
#if defined(KINORA_BUNDLE_READ)
    FILE *file = fopen(path, "rb");
    int64_t size = -1;
    unsigned char *bytes;
    if (!file) return kinora__fail(error, KINORA_CANNOT_READ, "%.180s cannot be opened", path);
    if (kinora__seek(file, 0, SEEK_END) == 0) size = (int64_t)kinora__tell(file);
    if (size <= 0 || (uint64_t)size > largest || kinora__seek(file, 0, SEEK_SET) != 0) {
        fclose(file);
        return kinora__fail(error, KINORA_CANNOT_READ, "%.180s is empty, too large, or no file", path);
    }
    bytes = (unsigned char *)malloc((size_t)size);
    if (!bytes) {
        fclose(file);
        return kinora__fail(error, KINORA_NO_MEMORY, "no memory for %.180s", path);
    }
    if (fread(bytes, 1, (size_t)size, file) != (size_t)size) {
        free(bytes);
        fclose(file);
        return kinora__fail(error, KINORA_CANNOT_READ, "%.180s cannot be read", path);
    }
    fclose(file);
    memory->bytes = bytes;
    memory->size = (uint64_t)size;
#else
    struct stat about;
    void *bytes;
    int file = open(path, O_RDONLY | O_NONBLOCK);
    if (file < 0) return kinora__fail(error, KINORA_CANNOT_READ, "%.180s cannot be opened", path);
    if (fstat(file, &about) != 0 || !S_ISREG(about.st_mode) || about.st_size <= 0 ||
        (uint64_t)about.st_size > largest) {
        close(file);
        return kinora__fail(error, KINORA_CANNOT_READ, "%.180s is empty, too large, or no file", path);
    }
    bytes = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (bytes == MAP_FAILED) return kinora__fail(error, KINORA_CANNOT_READ, "%.180s cannot be mapped", path);
    memory->bytes = (const unsigned char *)bytes;
    memory->size = (uint64_t)about.st_size;
#endif
    return KINORA_OK;
}

static void kinora__unmap(kinora__memory *memory) {
    void *bytes = (void *)(uintptr_t)memory->bytes; /* the one place that may give the memory back */
    if (!bytes) return;
#if defined(KINORA_BUNDLE_READ)
    free(bytes);
#else
    munmap(bytes, (size_t)memory->size);
#endif
    memory->bytes = NULL;
}

/* `folder`/`name`, on the heap. */
static char *kinora__path(const char *folder, const char *name) {
    size_t a = strlen(folder), b = strlen(name);
    char *path = a > (size_t)-1 - b - 2 ? NULL : (char *)malloc(a + b + 2);
    if (!path) return NULL;
    memcpy(path, folder, a);
    path[a] = '/';
    memcpy(path + a + 1, name, b + 1);
    return path;
}

/* A name of the string table; NULL unless it lies inside, is printable ASCII and ends with a zero byte. */
static const char *kinora__name(const kinora_bundle *b, uint64_t at, uint32_t size) {
    uint32_t i;
    if (size < 1 || size >= b->strings_size || at > b->strings_size - 1 - size || b->strings[at + size]) return NULL;
    for (i = 0; i < size; i++)
        if (b->strings[at + i] < 0x21 || b->strings[at + i] > 0x7E) return NULL;
    return b->strings + at;
}

static kinora__file kinora__file_at(const kinora_bundle *b, uint32_t number) {
    const unsigned char *p = b->file_table + (size_t)KINORA__FILE * number;
    kinora__file file;
    file.name_size = kinora__u32(p + 8);
    file.name = kinora__name(b, kinora__u64(p), file.name_size);
    file.checksum = kinora__u32(p + 12);
    file.size = kinora__u64(p + 16);
    file.data_offset = kinora__u64(p + 24);
    return file;
}

static kinora__record kinora__record_at(const kinora_bundle *b, uint32_t number) {
    const unsigned char *p = b->tensor_table + (size_t)KINORA__TENSOR * number;
    kinora__record tensor;
    uint32_t i;
    tensor.name_size = kinora__u32(p + 8);
    tensor.name = kinora__name(b, kinora__u64(p), tensor.name_size);
    tensor.file = kinora__u32(p + 12);
    tensor.dtype = kinora__u32(p + 16);
    tensor.rank = kinora__u32(p + 20);
    tensor.offset = kinora__u64(p + 24);
    tensor.size = kinora__u64(p + 32);
    tensor.checksum = kinora__u32(p + 40);
    tensor.scale = kinora__u32(p + 44);
    tensor.count = 1;
    for (i = 0; i < KINORA_MAX_RANK; i++) {
        tensor.shape[i] = kinora__u64(p + 64 + 8 * i);
        if (i < tensor.rank) tensor.count *= tensor.shape[i]; /* may wrap; kinora__check_tensor looks at it first */
    }
    return tensor;
}

/* The rules of a file record; `number` files precede it. */
static kinora_status kinora__check_file(const kinora_bundle *b, uint32_t number, kinora_error *error) {
    static const char ending[] = ".safetensors";
    const uint32_t tail = sizeof ending - 1;
    kinora__file file = kinora__file_at(b, number);
    if (!file.name) return kinora__fail(error, KINORA_BAD_INDEX, "the name of file %u is damaged", (unsigned)number);
    if (file.name_size <= tail || strcmp(file.name + file.name_size - tail, ending) != 0 || file.name[0] == '.' ||
        strpbrk(file.name, "/\\:"))
        return kinora__fail(error, KINORA_BAD_INDEX, "%.120s is no plain name that ends with %s", file.name, ending);
    if (number && strcmp(kinora__file_at(b, number - 1).name, file.name) >= 0)
        return kinora__fail(error, KINORA_BAD_INDEX, "file %.120s is out of order", file.name);
    if (file.data_offset <= 8 || file.data_offset % KINORA__PAGE || file.data_offset > file.size ||
        file.size > KINORA__LARGEST)
        return kinora__fail(error, KINORA_BAD_INDEX, "the place of the data of %.120s is impossible", file.name);
    return KINORA_OK;
}

/* The rules of a tensor record that concern itself, its file and the tensor before it. */
static kinora_status kinora__check_tensor(const kinora_bundle *b, uint32_t number, kinora_error *error) {
    const unsigned char *p = b->tensor_table + (size_t)KINORA__TENSOR * number;
    kinora__record tensor = kinora__record_at(b, number), before;
    kinora__file file;
    uint64_t product = 1, step;
    uint32_t i, width = kinora_dtype_size((kinora_dtype)tensor.dtype), part;
    if (!tensor.name) return kinora__fail(error, KINORA_BAD_INDEX, "the name of tensor %u is damaged", (unsigned)number);
    if (tensor.file >= b->files)
        return kinora__fail(error, KINORA_BAD_INDEX, "%.120s lies in no file of the bundle", tensor.name);
    if (!width || tensor.rank > KINORA_MAX_RANK)
        return kinora__fail(error, KINORA_BAD_INDEX, "%.120s has an unknown dtype or rank", tensor.name);
    if (kinora__u64(p + 48) || kinora__u64(p + 56))
        return kinora__fail(error, KINORA_BAD_INDEX, "%.120s has reserved fields that are not zero", tensor.name);
    for (i = 0; i < KINORA_MAX_RANK; i++) {
        uint64_t side = tensor.shape[i];
        if (i >= tensor.rank && side)
            return kinora__fail(error, KINORA_BAD_INDEX, "%.120s has reserved fields that are not zero", tensor.name);
        if (side > 1) {
            if (side > KINORA__LARGEST / product)
                return kinora__fail(error, KINORA_BAD_INDEX, "the shape of %.120s is absurd", tensor.name);
            product *= side;
        }
    }
    if (tensor.count > KINORA__LARGEST / width || tensor.count * width != tensor.size)
        return kinora__fail(error, KINORA_BAD_INDEX, "the size of %.120s is not that of its shape", tensor.name);
    file = kinora__file_at(b, tensor.file);
    part = file.name_size - (uint32_t)strlen(".safetensors");
    if (tensor.name_size <= part || strncmp(tensor.name, file.name, part) != 0 || tensor.name[part] != '.')
        return kinora__fail(error, KINORA_BAD_INDEX, "%.120s is not named after its file", tensor.name);
    step = tensor.size >= KINORA__PAGED ? KINORA__PAGE : KINORA__ALIGNMENT;
    if (tensor.offset % step) return kinora__fail(error, KINORA_BAD_INDEX, "%.120s is not aligned", tensor.name);
    if (tensor.offset < file.data_offset || tensor.offset > file.size || tensor.size > file.size - tensor.offset)
        return kinora__fail(error, KINORA_BAD_INDEX, "%.120s lies outside of %.80s", tensor.name, file.name);
    if (number) {
        before = kinora__record_at(b, number - 1); /* checked: offset + size cannot overflow */
        if (tensor.file < before.file || (tensor.file == before.file && tensor.offset < before.offset + before.size))
            return kinora__fail(error, KINORA_BAD_INDEX, "%.120s overlaps %.80s, or is out of order", tensor.name,
                                before.name);
    }
    return KINORA_OK;
}

static kinora_status kinora__check_scale(const kinora_bundle *b, uint32_t number, kinora_error *error) {
    kinora__record tensor = kinora__record_at(b, number), scale;
    if (tensor.scale == KINORA__NO_SCALE) return KINORA_OK;
    if (tensor.scale >= b->tensors)
        return kinora__fail(error, KINORA_BAD_INDEX, "the scale of %.120s points outside", tensor.name);
    scale = kinora__record_at(b, tensor.scale);
    if (scale.dtype != KINORA_F32 || scale.scale != KINORA__NO_SCALE || scale.file != tensor.file || !tensor.rank ||
        (scale.count != 1 && scale.count != tensor.shape[0]))
        return kinora__fail(error, KINORA_BAD_INDEX, "%.80s cannot be the scale of %.120s", scale.name, tensor.name);
    return KINORA_OK;
}

/* The numbers of all tensors by name, strictly ascending: every tensor once, no name twice. */
static kinora_status kinora__check_order(const kinora_bundle *b, kinora_error *error) {
    const char *before = NULL;
    uint32_t i;
    for (i = 0; i < b->tensors; i++) {
        uint32_t number = kinora__u32(b->order + (size_t)4 * i);
        const char *name;
        if (number >= b->tensors) return kinora__fail(error, KINORA_BAD_INDEX, "the order by name points outside");
        name = kinora__record_at(b, number).name;
        if (before && strcmp(before, name) >= 0)
            return kinora__fail(error, KINORA_BAD_INDEX, "%.120s appears twice, or the order by name is wrong", name);
        before = name;
    }
    return KINORA_OK;
}

/* The header of the index and the extent of its tables. */
static kinora_status kinora__check_header(kinora_bundle *b, kinora_error *error) {
    const unsigned char *p = b->index.bytes;
    const uint16_t one = 1;
    uint64_t size = b->index.size, tables, order;
    if (size < KINORA__HEADER || memcmp(p, "KINORAIX", 8) != 0)
        return kinora__fail(error, KINORA_BAD_INDEX, "bundle.idx is no index of a bundle");
    if (kinora__u32(p + 8) != 0x01020304u)
        return kinora__fail(error, KINORA_BAD_INDEX, "the mark of the index's byte order is wrong");
    if (*(const unsigned char *)&one != 1)
        return kinora__fail(error, KINORA_BAD_INDEX, "bundles are little-endian and this machine is not");
    if (kinora__u32(p + 12) != 1)
        return kinora__fail(error, KINORA_BAD_INDEX, "the index has version %u; this program reads version 1",
                            (unsigned)kinora__u32(p + 12));
    if (kinora__u64(p + 16) != size) return kinora__fail(error, KINORA_BAD_INDEX, "the index was cut, or grew");
    if (kinora__crc(b, p + KINORA__CHECKED_FROM, size - KINORA__CHECKED_FROM) != kinora__u32(p + 24))
        return kinora__fail(error, KINORA_BAD_INDEX, "the checksum of the index does not fit; it was damaged");
    b->files = kinora__u32(p + 28);
    b->tensors = kinora__u32(p + 32);
    b->strings_size = kinora__u64(p + 48);
    if (kinora__u32(p + 36) != KINORA__ALIGNMENT || kinora__u32(p + 40) != KINORA__PAGE || kinora__u32(p + 44) ||
        kinora__u64(p + 56))
        return kinora__fail(error, KINORA_BAD_INDEX, "alignments or reserved fields of the index are wrong");
    if (b->files < 1 || b->files > KINORA__MAX_FILES)
        return kinora__fail(error, KINORA_BAD_INDEX, "the index has %u files; 1 to 1024 are allowed", (unsigned)b->files);
    order = ((uint64_t)4 * b->tensors + 7) / 8 * 8;
    tables = KINORA__HEADER + (uint64_t)KINORA__FILE * b->files + (uint64_t)KINORA__TENSOR * b->tensors + order;
    if (tables > size || b->strings_size != size - tables)
        return kinora__fail(error, KINORA_BAD_INDEX, "the tables of the index do not fill it");
    b->file_table = p + KINORA__HEADER;
    b->tensor_table = b->file_table + (size_t)KINORA__FILE * b->files;
    b->order = b->tensor_table + (size_t)KINORA__TENSOR * b->tensors;
    b->strings = (const char *)b->order + order;
    if (b->tensors % 2 && kinora__u32(b->order + (size_t)4 * b->tensors))
        return kinora__fail(error, KINORA_BAD_INDEX, "bytes between the tables of the index are not zero");
    return KINORA_OK;
}

static kinora_status kinora__map_file(kinora_bundle *b, const char *folder, uint32_t number, kinora_error *error) {
    kinora__file file = kinora__file_at(b, number);
    kinora_status status;
    char *path;
    if (file.size > KINORA_LARGEST_FILE)
        return kinora__fail(error, KINORA_NO_MEMORY, "%.120s has %llu bytes; this program can address files of up to %llu",
                            file.name, (unsigned long long)file.size, (unsigned long long)KINORA_LARGEST_FILE);
    path = kinora__path(folder, file.name);
    if (!path) return kinora__fail(error, KINORA_NO_MEMORY, "no memory for the name of a file");
#if defined(KINORA_BUNDLE_READ)
    status = kinora__map(path, file.size, &b->maps[number], error); /* never more memory than the index says */
#else
    status = kinora__map(path, KINORA_LARGEST_FILE, &b->maps[number], error);
#endif
    free(path);
    if (status != KINORA_OK) return status;
    if (b->maps[number].size != file.size)
        return kinora__fail(error, KINORA_BAD_FILE, "%.120s is longer or shorter than its index says", file.name);
    if (kinora__u64(b->maps[number].bytes) != file.data_offset - 8)
        return kinora__fail(error, KINORA_BAD_FILE, "the header of %.120s is not as its index says", file.name);
    return KINORA_OK;
}

static kinora_status kinora__load(kinora_bundle *b, const char *folder, kinora_error *error) {
    kinora_status status;
    uint32_t i;
    char *path = kinora__path(folder, "bundle.idx");
    if (!path) return kinora__fail(error, KINORA_NO_MEMORY, "no memory for the name of the index");
    status = kinora__map(path, KINORA__MAX_INDEX, &b->index, error);
    free(path);
    if (status == KINORA_OK) status = kinora__check_header(b, error);
    for (i = 0; status == KINORA_OK && i < b->files; i++) status = kinora__check_file(b, i, error);
    for (i = 0; status == KINORA_OK && i < b->tensors; i++) status = kinora__check_tensor(b, i, error);
    for (i = 0; status == KINORA_OK && i < b->tensors; i++) status = kinora__check_scale(b, i, error);
    if (status == KINORA_OK) status = kinora__check_order(b, error);
    if (status != KINORA_OK) return status;
    b->maps = (kinora__memory *)calloc(b->files, sizeof *b->maps);
    if (!b->maps) return kinora__fail(error, KINORA_NO_MEMORY, "no memory for %u files", (unsigned)b->files);
    for (i = 0; status == KINORA_OK && i < b->files; i++) status = kinora__map_file(b, folder, i, error);
    return status;
}

kinora_bundle *kinora_bundle_open(const char *folder, kinora_error *error) {
    kinora_bundle *b = (kinora_bundle *)calloc(1, sizeof *b);
    if (!b) {
        kinora__fail(error, KINORA_NO_MEMORY, "no memory for a bundle");
        return NULL;
    }
    kinora__crc_tables(b->crc);
    if (kinora__load(b, folder, error) != KINORA_OK) {
        kinora_bundle_close(b);
        return NULL;
    }
    kinora__done(error);
    return b;
}

void kinora_bundle_close(kinora_bundle *b) {
    uint32_t i;
    if (!b) return;
    for (i = 0; b->maps && i < b->files; i++) kinora__unmap(&b->maps[i]);
    free(b->maps);
    kinora__unmap(&b->index);
    free(b);
}

uint32_t kinora_bundle_count(const kinora_bundle *b) { return b->tensors; }

kinora_status kinora_bundle_tensor(const kinora_bundle *b, uint32_t number, kinora_tensor *tensor,
                                   kinora_error *error) {
    kinora__record found, scale;
    uint64_t stride = 1;
    uint32_t i;
    if (number >= b->tensors)
        return kinora__fail(error, KINORA_NOT_FOUND, "there is no tensor %u; the bundle has %u", (unsigned)number,
                            (unsigned)b->tensors);
    found = kinora__record_at(b, number);
    memset(tensor, 0, sizeof *tensor);
    tensor->name = found.name;
    tensor->dtype = (kinora_dtype)found.dtype;
    tensor->rank = found.rank;
    tensor->count = found.count;
    tensor->size = found.size;
    tensor->number = number;
    tensor->data = b->maps[found.file].bytes + found.offset;
    for (i = found.rank; i-- > 0;) {
        tensor->shape[i] = found.shape[i];
        tensor->strides[i] = stride;
        stride *= found.shape[i] > 1 ? found.shape[i] : 1;
    }
    if (found.scale != KINORA__NO_SCALE) {
        scale = kinora__record_at(b, found.scale);
        tensor->scale = (const float *)(const void *)(b->maps[scale.file].bytes + scale.offset);
        tensor->scale_count = scale.count;
    }
    return kinora__done(error);
}

kinora_status kinora_bundle_find(const kinora_bundle *b, const char *name, kinora_tensor *tensor,
                                 kinora_error *error) {
    uint32_t low = 0, high = b->tensors;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2, number = kinora__u32(b->order + (size_t)4 * middle);
        int order = strcmp(name, kinora__record_at(b, number).name);
        if (order == 0) return kinora_bundle_tensor(b, number, tensor, error);
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return kinora__fail(error, KINORA_NOT_FOUND, "the bundle has no tensor %.180s", name);
}

kinora_status kinora_bundle_verify(const kinora_bundle *b, kinora_error *error) {
    uint32_t i, file_number;
    for (file_number = 0, i = 0; file_number < b->files; file_number++) {
        kinora__file file = kinora__file_at(b, file_number);
        const unsigned char *bytes = b->maps[file_number].bytes;
        uint64_t end = file.data_offset;
        if (kinora__crc(b, bytes, end) != file.checksum)
            return kinora__fail(error, KINORA_BAD_CHECKSUM, "the header of %.120s was damaged", file.name);
        for (; i < b->tensors; i++) {
            kinora__record tensor = kinora__record_at(b, i);
            if (tensor.file != file_number) break;
            for (; end < tensor.offset; end++)
                if (bytes[end])
                    return kinora__fail(error, KINORA_BAD_CHECKSUM, "bytes before %.120s are not zero", tensor.name);
            if (kinora__crc(b, bytes + tensor.offset, tensor.size) != tensor.checksum)
                return kinora__fail(error, KINORA_BAD_CHECKSUM, "%.120s was damaged", tensor.name);
            end = tensor.offset + tensor.size;
        }
        if (end != file.size)
            return kinora__fail(error, KINORA_BAD_CHECKSUM, "%.120s has bytes behind its last tensor", file.name);
    }
    return kinora__done(error);
}

static const struct {
    const char *name;
    uint32_t size;
} kinora__dtypes[] = {{"?", 0},  {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1},
                      {"I64", 8}, {"I32", 4}, {"I16", 2}, {"I8", 1},  {"U8", 1},   {"BOOL", 1}};

static uint32_t kinora__dtype_row(kinora_dtype dtype) {
    uint32_t code = (uint32_t)dtype;
    return code < sizeof kinora__dtypes / sizeof kinora__dtypes[0] ? code : 0;
}

const char *kinora_dtype_name(kinora_dtype dtype) { return kinora__dtypes[kinora__dtype_row(dtype)].name; }

uint32_t kinora_dtype_size(kinora_dtype dtype) { return kinora__dtypes[kinora__dtype_row(dtype)].size; }

static float kinora__bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

float kinora_from_bf16(uint16_t bits) { return kinora__bits((uint32_t)bits << 16); }

float kinora_from_f16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return kinora__bits(sign | 0x7F800000u | mantissa << 13);
    if (!exponent) return (sign ? -1.0f : 1.0f) * (float)mantissa * kinora__bits(103u << 23); /* 2^-24 */
    return kinora__bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

float kinora_from_f8_e4m3(uint8_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x80) << 24, exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return kinora__bits(sign | 0x7FC00000u);
    if (!exponent) return (sign ? -1.0f : 1.0f) * (float)mantissa * kinora__bits(118u << 23); /* 2^-9 */
    return kinora__bits(sign | (exponent + 120) << 23 | mantissa << 20);
}

#ifdef __cplusplus
}
#endif

#endif /* KINORA_BUNDLE_IMPLEMENTATION */
