/* A CUDA driver without a GPU: it loads kernels, notes what is launched, and runs nothing.
 *
 * For a function that is not here, cuGetProcAddress gives NULL, which the library reports when it
 * calls it. The number and sizes of a kernel's arguments are read from the machine code it
 * was loaded from, not taken from the caller that launches it.
 *
 * There are three devices; the second is of another kind than the first and the third. Functions
 * whose names begin with fake_ are for the tests. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
enum { DEVICES = 3, PARAMETERS = 64, LAUNCHES = 256 };
enum { STATIC = 16 << 10 }; /* bytes of static shared memory per kernel */

typedef int Result;
typedef uintptr_t Handle;

/* -- how often each function was called -------------------------------------------------------- */

struct calls {
    const char *name;
    long count;
    struct calls *next;
};
static struct calls *all_calls;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void count(struct calls *calls, const char *name) {
    pthread_mutex_lock(&lock);
    if (!calls->name) {
        calls->name = name;
        calls->next = all_calls;
        all_calls = calls;
    }
    calls->count++;
    pthread_mutex_unlock(&lock);
}

#define CALLED                                                                                     \
    static struct calls calls;                                                                     \
    count(&calls, __func__)

/* Return the number of calls of all functions whose names begin with `prefix`. */
long fake_calls(const char *prefix) {
    long sum = 0;
    for (struct calls *calls = all_calls; calls; calls = calls->next)
        if (!strncmp(calls->name, prefix, strlen(prefix))) sum += calls->count;
    return sum;
}

/* -- devices, contexts, streams: a context's handle is 1000 + device --------------------------- */

static __thread int stack[64], depth; /* this thread's current devices */

static Handle context_of(int device) { return 1000 + device; }

/* Streams are 100 x device + 10, + 11, ...; the default streams are of the current device. */
static int device_of(Handle stream) {
    if (stream >= 10) return (int)(stream / 100);
    return depth ? stack[depth - 1] : -1;
}

/* What cudaSetDevice does to this thread; -1: it has no context. */
void fake_set_device(int device) {
    depth = device >= 0;
    stack[0] = device;
}

/* What cudaGetDevice says. */
int fake_device(void) { return depth ? stack[depth - 1] : 0; }

int fake_depth(void) { return depth; }

Result cuInit(unsigned flags) { CALLED; return OK; }
Result cuDriverGetVersion(int *version) { CALLED; *version = 13000; return OK; }
Result cuDeviceGetCount(int *number) { CALLED; *number = DEVICES; return OK; }

Result cuDeviceGet(int *device, int ordinal) {
    CALLED;
    *device = ordinal;
    return ordinal < DEVICES ? OK : INVALID_DEVICE;
}

Result cuDeviceGetName(char *name, int size, int device) {
    CALLED;
    snprintf(name, size, "fake %d", device);
    return OK;
}

Result cuDeviceGetUuid_v2(char *uuid, int device) {
    CALLED;
    memset(uuid, 1 + device, 16);
    return OK;
}

Result cuDeviceTotalMem_v2(size_t *bytes, int device) {
    CALLED;
    *bytes = (size_t)80 << 30;
    return OK;
}

static int shared_memory, clusters; /* of all devices */

/* Set the bytes of shared memory that a block may have, and whether blocks may form clusters. */
void fake_resources(int bytes, int has_clusters) { shared_memory = bytes, clusters = has_clusters; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALLED;
    switch (attribute) {
    case 75: *value = device == 1 ? 8 : 9; break; /* compute capability, major */
    case 76: *value = 0; break;                   /* minor */
    case 16: *value = 132; break;                 /* multiprocessors */
    case 10: *value = 32; break;                  /* threads of a warp */
    case 97: *value = shared_memory; break;       /* of a block, at most */
    case 120: *value = clusters; break;
    case 1: case 2: case 3: *value = 1024; break; /* threads of a block */
    default: *value = 1;
    }
    return OK;
}

Result cuDevicePrimaryCtxRetain(Handle *context, int device) {
    CALLED;
    *context = context_of(device);
    return OK;
}

Result cuDevicePrimaryCtxRelease_v2(int device) { CALLED; return OK; }

Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    CALLED;
    *flags = 0;
    *active = 1;
    return OK;
}

Result cuCtxGetCurrent(Handle *context) {
    CALLED;
    *context = depth ? context_of(stack[depth - 1]) : 0;
    return OK;
}

Result cuCtxSetCurrent(Handle context) {
    CALLED;
    if (!depth) depth = 1;
    stack[depth - 1] = (int)(context - context_of(0));
    return OK;
}

Result cuCtxPushCurrent_v2(Handle context) {
    CALLED;
    stack[depth++] = (int)(context - context_of(0));
    return OK;
}

Result cuCtxPopCurrent_v2(Handle *context) {
    CALLED;
    if (!depth) return INVALID_CONTEXT;
    *context = context_of(stack[--depth]);
    return OK;
}

Result cuCtxGetDevice(int *device) {
    CALLED;
    *device = depth ? stack[depth - 1] : -1;
    return depth ? OK : INVALID_CONTEXT;
}

Result cuMemGetInfo_v2(size_t *free_, size_t *total) {
    CALLED;
    *free_ = *total = (size_t)80 << 30;
    return OK;
}

/* -- kernels ----------------------------------------------------------------------------------- */

struct kernel {
    char name[512];
    int device; /* that was current when it was loaded */
    int parameters;
    int size[PARAMETERS];
    unsigned shared; /* bytes that a launch may ask for */
};

struct library {
    const unsigned char *image;
    int device;
};

/* Sizes of a kernel's parameters: section .nv.info.NAME, whose entries are format, attribute and,
 * for format 4, a number of bytes and these bytes. Attribute 0x17 is one parameter: 4 unused bytes,
 * 2 of its ordinal, 2 of its offset, and 4 whose upper 14 bits are its size. */
static Result read_parameters(const unsigned char *image, struct kernel *kernel) {
    const Elf64_Ehdr *elf = (const Elf64_Ehdr *)image;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + elf->e_shoff);
    const char *names = (const char *)image + sections[elf->e_shstrndx].sh_offset;
    for (int i = 0; i < elf->e_shnum; i++) {
        const char *name = names + sections[i].sh_name;
        if (strncmp(name, ".nv.info.", 9) || strcmp(name + 9, kernel->name)) continue;
        const unsigned char *at = image + sections[i].sh_offset;
        const unsigned char *end = at + sections[i].sh_size;
        while (at < end) {
            uint16_t bytes = at[0] == 4 ? (uint16_t)(at[2] | at[3] << 8) : 0;
            if (at[0] == 4 && at[1] == 0x17) {
                uint16_t ordinal;
                uint32_t sizes;
                memcpy(&ordinal, at + 8, 2), memcpy(&sizes, at + 12, 4);
                if (ordinal >= PARAMETERS) return INVALID_VALUE;
                kernel->size[ordinal] = (int)(sizes >> 18);
                if (ordinal >= kernel->parameters) kernel->parameters = ordinal + 1;
            }
            at += 4 + bytes;
        }
        return OK;
    }
    return NOT_FOUND;
}

Result cuLibraryLoadData(
    struct library **library, const void *image, void *a, void *b, unsigned m, void *c, void *d,
    unsigned n
) {
    CALLED;
    *library = malloc(sizeof **library);
    (*library)->image = image;
    (*library)->device = fake_device();
    return OK;
}

Result cuLibraryUnload(struct library *library) { CALLED; return OK; }

Result cuLibraryGetKernel(struct kernel **kernel, struct library *library, const char *name) {
    CALLED;
    *kernel = calloc(1, sizeof **kernel);
    snprintf((*kernel)->name, sizeof (*kernel)->name, "%s", name);
    (*kernel)->device = library->device;
    (*kernel)->shared = (48 << 10) - STATIC;
    return read_parameters(library->image, *kernel);
}

Result cuKernelGetFunction(struct kernel **function, struct kernel *kernel) {
    CALLED;
    *function = kernel;
    return OK;
}

static int attribute_of_kernel(int attribute) {
    return attribute == 0 ? 1024 : attribute == 1 ? STATIC : 32; /* 0: threads, 1: shared memory */
}

Result cuKernelGetAttribute(int *value, int attribute, struct kernel *kernel, int device) {
    CALLED;
    *value = attribute_of_kernel(attribute);
    return OK;
}

Result cuFuncGetAttribute(int *value, int attribute, struct kernel *kernel) {
    CALLED;
    *value = attribute_of_kernel(attribute);
    return OK;
}

/* There is no cuFuncSetAttribute: what a library hands it would be a kernel, which it refuses. */
Result cuKernelSetAttribute(int attribute, int value, struct kernel *kernel, int device) {
    CALLED;
    if (attribute != 8 || value + STATIC > shared_memory) return INVALID_VALUE;
    kernel->shared = (unsigned)value;
    return OK;
}

/* -- launches ---------------------------------------------------------------------------------- */

struct launch {
    struct kernel *kernel;
    unsigned grid[3], block[3], shared, cluster;
    int device;
    Handle stream;
    unsigned char parameter[PARAMETERS][8];
};
static struct launch launches[LAUNCHES];
static long launched;
static Result next_error;
static unsigned microseconds;

/* Launches since the start; the last of them are kept. */
long fake_launched(void) { return launched; }

struct launch *fake_launch(long number) { return &launches[number % LAUNCHES]; }

/* The next launch fails. */
void fake_fail(Result error) { next_error = error; }

/* Each launch waits this many microseconds before it reads its arguments. */
void fake_delay(unsigned time) { microseconds = time; }

static Result launch(
    struct kernel *kernel, const unsigned *grid, const unsigned *block, unsigned shared,
    unsigned cluster, Handle stream, void **parameters, void **extra
) {
    if (next_error) {
        Result error = next_error;
        next_error = OK;
        return error;
    }
    int device = device_of(stream);
    if (device < 0) return INVALID_CONTEXT;
    if (!parameters || extra || !grid[0] || !block[0]) return INVALID_VALUE;
    if (shared > kernel->shared) return INVALID_VALUE;
    if (cluster > 1 && (!clusters || cluster > 8 || grid[0] % cluster)) return INVALID_VALUE;
    if (microseconds) usleep(microseconds);
    pthread_mutex_lock(&lock);
    struct launch *this = &launches[launched++ % LAUNCHES];
    this->kernel = kernel;
    memcpy(this->grid, grid, sizeof this->grid);
    memcpy(this->block, block, sizeof this->block);
    this->shared = shared;
    this->cluster = cluster;
    this->device = device;
    this->stream = stream;
    for (int i = 0; i < kernel->parameters; i++)
        memcpy(this->parameter[i], parameters[i], kernel->size[i]);
    pthread_mutex_unlock(&lock);
    return OK;
}

Result cuLaunchKernel(
    struct kernel *kernel, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
    unsigned shared, Handle stream, void **parameters, void **extra
) {
    CALLED;
    unsigned grid[3] = {x, y, z}, block[3] = {a, b, c};
    return launch(kernel, grid, block, shared, 1, stream, parameters, extra);
}

struct attribute {
    int id;
    unsigned nothing, value[16];
};

struct config {
    unsigned grid[3], block[3], shared;
    Handle stream;
    struct attribute *attributes;
    unsigned number;
};

Result cuLaunchKernelEx(
    const struct config *config, struct kernel *kernel, void **parameters, void **extra
) {
    CALLED;
    unsigned cluster = 1;
    for (unsigned i = 0; i < config->number; i++) {
        const struct attribute *attribute = &config->attributes[i];
        if (attribute->id != 4 || attribute->value[1] != 1 || attribute->value[2] != 1)
            return INVALID_VALUE; /* 4: the cluster's dimensions */
        cluster = attribute->value[0];
    }
    return launch(
        kernel, config->grid, config->block, config->shared, cluster, config->stream, parameters,
        extra
    );
}

/* -- functions that make the host wait: launches must not call them ---------------------------- */

Result cuStreamSynchronize(Handle stream) { CALLED; return OK; }
Result cuCtxSynchronize(void) { CALLED; return OK; }
Result cuEventSynchronize(Handle event) { CALLED; return OK; }
Result cuMemAlloc_v2(Handle *memory, size_t size) { CALLED; *memory = 4096; return OK; }
Result cuMemFree_v2(Handle memory) { CALLED; return OK; }
Result cuMemcpyHtoD_v2(Handle to, const void *from, size_t size) { CALLED; return OK; }
Result cuMemcpyDtoH_v2(void *to, Handle from, size_t size) { CALLED; return OK; }

/* -- errors and names -------------------------------------------------------------------------- */

Result cuGetErrorName(Result error, const char **text) {
    CALLED;
    *text = error == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_FAKE";
    return OK;
}

Result cuGetErrorString(Result error, const char **text) {
    CALLED;
    *text = "an error of the fake driver";
    return OK;
}

Result cuGetProcAddress_v2(
    const char *name, void **function, int version, uint64_t flags, int *status
) {
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)cuGetProcAddress_v2, &info))
        self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    char versioned[256];
    const char *suffixes[] = {"_v2", ""};
    *function = NULL;
    for (int i = 0; i < 2 && !*function; i++) {
        snprintf(versioned, sizeof versioned, "%s%s", name, suffixes[i]);
        *function = dlsym(self, versioned);
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}

Result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
