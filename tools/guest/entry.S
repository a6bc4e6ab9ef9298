/* Firmware entry: from the reset vector to flat 32-bit protected mode, then writer().
 *
 * The image is the machine's only firmware. It is mapped so that its last byte lies at 4 GiB - 1; the CPU starts 16
 * bytes below that in real mode with CS.base = 0xffff0000. No interrupts, no devices, RAM untouched until writer().
 */
        .section .lowmode, "ax"
        .code16
        .globl enter
enter:
        cli
        cs lgdtl (descriptor_table_register - enter + ENTER_OFFSET)
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $0x08, $flat

        .balign 8
descriptors:
        .quad   0x0000000000000000
        .quad   0x00cf9b000000ffff      /* 0x08: code, base 0, limit 4 GiB; accessed already, */
        .quad   0x00cf93000000ffff      /* 0x10: data; for the CPU cannot write that bit here */
descriptor_table_register:
        .word   . - descriptors - 1
        .long   descriptors

        .text
        .code32
flat:
        mov     $0x10, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $STACK_TOP, %esp
        call    writer
halted:
        hlt
        jmp     halted

        .section .vector, "ax"
        .code16
        .globl vector
vector:
        jmp     enter
