"""The fixed parts of a printed C program: the device, slots, vCPUs and rings in plain C11 over ``linux/kvm.h``."""

HEADER = r"""#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <linux/kvm.h>

#define CONTROL_GPA 0xff000000ull
#define CONTROL_BYTES (256 << 10)
#define VCPUS_MAX 8
#define ARENA_BYTES (16 << 20)

static int kvm, vm, n_vcpus, vcpu_fd[VCPUS_MAX], step;
static struct kvm_run *run_page[VCPUS_MAX];
static struct kvm_dirty_gfn *ring[VCPUS_MAX];
static __u64 ring_bytes, ring_fetch[VCPUS_MAX], bitmap[4096];
static __u8 *arena, *control;
static void *bad_pointer;
static long exit_reason, ops_done, n_loaded;
static __u32 loaded[4096];
static int stopped;

static void fail(const char *what, long got, long wanted)
{
    printf("step %d: %s %ld, expected %ld\n", step, what, got, wanted);
    exit(1);
}

/* The result of an ioctl against 0 (success) or an errno. */
static void expect(long result, int error)
{
    int got = result < 0 ? errno : 0;
    if (got != error)
        fail("errno", got, error);
    step++;
}

static void expect_value(long long got, long long wanted)
{
    if (got != wanted)
        fail("value", got, wanted);
}

static void *map(size_t size, int prot, int flags, int fd, off_t offset)
{
    void *address = mmap(NULL, size, prot, flags, fd, offset);
    if (address == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    return address;
}

static int region_at(__u32 slot, __u32 flags, __u64 gpa, __u64 size, __u64 hva)
{
    struct kvm_userspace_memory_region r = {slot, flags, gpa, size, hva};
    return ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
}
#define region(slot, flags, gpa, size, hva) region_at(slot, flags, gpa, size, (__u64)(hva))

static int get(__u32 slot, int good)
{
    struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = good ? (void *)bitmap : bad_pointer};
    memset(bitmap, 0, sizeof bitmap);
    return ioctl(vm, KVM_GET_DIRTY_LOG, &log);
}

static int clear(__u32 slot, __u64 first, __u32 pages, void *mask)
{
    struct kvm_clear_dirty_log log = {.slot = slot, .num_pages = pages, .first_page = first, .dirty_bitmap = mask};
    return ioctl(vm, KVM_CLEAR_DIRTY_LOG, &log);
}

static int enable_cap(__u32 cap, __u32 flags, const __u64 *args)
{
    struct kvm_enable_cap request = {.cap = cap, .flags = flags};
    memcpy(request.args, args, sizeof request.args);
    int result = ioctl(vm, KVM_ENABLE_CAP, &request);
    if (result == 0 && (cap == KVM_CAP_DIRTY_LOG_RING || cap == 223))
        ring_bytes = args[0];
    return result;
}

/* Protected mode without paging, every segment 0..4 GiB. */
static void flat_mode(int fd)
{
    struct kvm_sregs s;
    ioctl(fd, KVM_GET_SREGS, &s);
    struct kvm_segment data = {.limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    s.ds = s.es = s.fs = s.gs = s.ss = s.cs = data;
    s.cs.selector = 8;
    s.cs.type = 11;
    s.cr0 |= 1;
    ioctl(fd, KVM_SET_SREGS, &s);
}

static int create_vcpu(int id)
{
    if (control == NULL) {
        control = map(VCPUS_MAX * CONTROL_BYTES, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        region(32700, 0, CONTROL_GPA, VCPUS_MAX * CONTROL_BYTES, control);
    }
    int fd = ioctl(vm, KVM_CREATE_VCPU, id);
    if (fd < 0)
        return fd;
    int n = n_vcpus++;
    vcpu_fd[n] = fd;
    run_page[n] = map(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), 3, MAP_SHARED, fd, 0);
    if (ring_bytes)
        ring[n] = map(ring_bytes, 3, MAP_SHARED, fd, 64 * 4096);
    flat_mode(fd);
    return 0;
}

/* One operation (or none) and HLT.  After an exit other than HLT the rest of the list is not entered. */
static void run_code(int n, const unsigned char *code, size_t bytes)
{
    if (stopped)
        return;
    struct kvm_regs regs = {.rip = CONTROL_GPA, .rflags = 2};
    memcpy(control, code, bytes);
    ioctl(vcpu_fd[n], KVM_SET_REGS, &regs);
    while (ioctl(vcpu_fd[n], KVM_RUN, 0) < 0 && errno == EINTR)
        ;
    exit_reason = run_page[n]->exit_reason;
    if (exit_reason == KVM_EXIT_HLT) {
        ops_done++;
        if (code[0] == 0xa1)
            loaded[n_loaded++] = *(__u32 *)(control + CONTROL_BYTES / 2);
        return;
    }
    stopped = 1;
    if (exit_reason == KVM_EXIT_MMIO) { /* let KVM complete the instruction without entering the guest */
        run_page[n]->immediate_exit = 1;
        ioctl(vcpu_fd[n], KVM_RUN, 0);
        run_page[n]->immediate_exit = 0;
    }
}

static void end_run(void)
{
    stopped = 0;
    ops_done = n_loaded = 0;
    step++;
}

static void expect_harvest(int n, __u32 slot, __u64 offset)
{
    struct kvm_dirty_gfn *entry = &ring[n][ring_fetch[n]++ % (ring_bytes / 16)];
    expect_value(entry->flags, 1);
    expect_value(entry->slot, slot);
    expect_value(entry->offset, offset);
    entry->flags = 2;
}

static void expect_no_harvest(int n)
{
    expect_value(ring[n][ring_fetch[n] % (ring_bytes / 16)].flags & 1, 0);
    step++;
}

int main(void)
{
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0) {
        perror("/dev/kvm");
        return 2;
    }
    arena = map(ARENA_BYTES, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bad_pointer = map(4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
"""

FOOTER = r"""    (void)expect_harvest, (void)expect_no_harvest, (void)run_code, (void)end_run, (void)get, (void)clear;
    (void)create_vcpu, (void)enable_cap, (void)region_at, (void)loaded;
    puts("every answer as expected");
    return 0;
}
"""
