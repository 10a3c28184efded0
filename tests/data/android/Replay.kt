// The app's runner on the JVM. Its engine asks the test, which answers on stdin: one line each way. Then images, one after another.

package org.messtf.replay

import java.io.File
import org.messtf.example.Description
import org.messtf.example.Engine
import org.messtf.example.Runner

private fun ask(question: String): String {
    println(question)
    return checkNotNull(readLine())
}

private fun hex(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(it) }

private fun bytes(hex: String) = ByteArray(hex.length / 2) { Integer.parseInt(hex.substring(2 * it, 2 * it + 2), 16).toByte() }

/** Its tensors are numbers that the test gives. */
private class Asking : Engine<Int> {
    override fun input(signature: String, name: String): Int = ask("input $signature $name").toInt()

    override fun output(signature: String, name: String): Int = ask("output $signature $name").toInt()

    override fun run(signature: String, inputs: Map<String, Int>, outputs: Map<String, Int>) {
        ask("run $signature ${words(inputs)} ${words(outputs)}")
    }

    private fun words(tensors: Map<String, Int>) = tensors.entries.joinToString(",") { "${it.key}=${it.value}" }

    override fun write(tensor: Int, bytes: ByteArray) {
        ask("bytes $tensor ${hex(bytes)}")
    }

    override fun write(tensor: Int, floats: FloatArray) {
        ask("floats $tensor ${floats.joinToString(",")}")
    }

    override fun readInt(tensor: Int): Int = ask("int $tensor").toInt()

    override fun readFloats(tensor: Int): FloatArray = ask("sure $tensor").split(",").map { it.toFloat() }.toFloatArray()

    override fun readBytes(tensor: Int): ByteArray = bytes(ask("mask $tensor"))

    override fun close() {
        ask("close")
    }
}

/** Arguments: manifest.json and signatures.json. */
fun main(arguments: Array<String>) {
    val description = Description(File(arguments[0]).readText(), File(arguments[1]).readText())
    val runner = Runner(description, Asking()) { ask("clock").toLong() }
    while (true) {
        val words = ask("next").split(" ")
        if (words[0] == "end") break
        val (height, width) = Pair(words[0].toInt(), words[1].toInt())
        val rgb = bytes(words[2])
        val colours = IntArray(height * width) { pixel ->
            (0..2).fold(0xff) { colour, c -> (colour shl 8) or (rgb[3 * pixel + c].toInt() and 0xff) }
        }
        val deadline = if (words[4] == "none") Double.POSITIVE_INFINITY else words[4].toDouble()
        val result = if (words[3] == "own") {
            runner.run(colours, height, width, deadline = deadline)
        } else {
            val thresholds = words[3].split(",").map { if (it == "none") null else it.toDouble() }
            runner.run(colours, height, width, thresholds, deadline)
        }
        val trace = result.trace.joinToString(",") {
            listOf(it.exit, it.confidence ?: "none", it.milliseconds, it.budget ?: "none", it.active ?: "none").joinToString("=")
        }
        ask("result ${result.exit} $trace ${result.milliseconds} ${hex(result.mask)}")
    }
    runner.close()
}
